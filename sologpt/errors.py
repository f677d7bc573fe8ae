"""A mistake of the user's, told apart from a fault of the program."""


class UserError(ValueError):
    """What the user can put right: the message says what is wrong, why, and which flag or command helps.

    configurator.run_script prints it as one line. Any other exception, OSError aside, keeps its traceback.
    """
