"""The error for what a user can mend; the command line turns it into one line and exit status 2."""

from t2t_kernels.errors import unknown_name

__all__ = ["InputError", "unknown_name"]


class InputError(ValueError):
    """Bad input from the user. The message says what is wrong, where, and how to mend it."""
