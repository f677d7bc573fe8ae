"""
A mistake of the user's, told apart from a fault of the program, and what libraries say of theirs.
"""


class UserError(ValueError):
    """A mistake that the user can put right: says what is wrong, why, and which flag or command helps.

    configurator.run_script prints it as one line, as it does OSError and running out of memory. Any other
    exception keeps its traceback.
    """


def first_line(error):
    """Returns the first line of an exception's message, or its kind if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def first_mismatch(error):
    """Returns what load_state_dict's error lists first, of weights that do not fit a model."""
    return " ".join(str(error).splitlines()[1:2]).strip()


def out_of_memory(error):
    """Whether an exception is one of the many by which torch, CUDA's libraries or the system say that memory
    ran out."""
    name = type(error).__name__  # torch, whose error has this name, is not imported here
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        return True
    # cuBLAS cannot be started on a full card, and says no more than that
    phrases = ("allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "cublasCreate")
    return any(phrase in str(error) for phrase in phrases)
