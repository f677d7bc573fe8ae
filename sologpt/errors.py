"""
A mistake of the user's, as opposed to a fault of the program.
"""


class UserError(ValueError):
    """What the user can put right: the message says what is wrong, why, and which flag or command helps.

    configurator.run_script prints it as one line, as it does an OSError and running out of memory; any other
    exception is a fault of the program and keeps its traceback.
    """
