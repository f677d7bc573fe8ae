"""
A mistake of the user's, told apart from a fault of the program.
"""


class UserError(ValueError):
    """A mistake that the user can put right: says what is wrong, why, and which flag or command helps.

    configurator.run_script prints it as one line, as it does OSError and running out of memory. Any other
    exception keeps its traceback.
    """


def out_of_memory(error):
    """Whether an exception is one of the many by which torch, CUDA's libraries or the system say that memory
    ran out."""
    name = type(error).__name__  # torch, whose error has this name, is not imported here
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return True
    phrases = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return any(phrase in str(error) for phrase in phrases)
