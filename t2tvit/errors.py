"""Errors. The command line prints an InputError in one line and exits with status 2."""

from t2t_kernels.errors import unknown_name

__all__ = [
    *("InputError", "LabelError", "NonFiniteLoss", "OneRankError", "RunError", "SaidElsewhere"),
    "unknown_name",
]


class InputError(ValueError):
    """Bad input from the user. The message says what is wrong, where, and how to fix it."""

    of_one_rank = False  # whether other processes of the run do not meet it


class LabelError(InputError):
    """A label outside the classes. Unlike an unreadable image, the sample is never replaced."""


class OneRankError(InputError):
    """An InputError that may occur on a single rank only, such as an unreadable image."""

    of_one_rank = True


class SaidElsewhere(Exception):
    """This process ends, with ``status``, because of an error that another process reports."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class RunError(RuntimeError):
    """A command failed for a reason other than its input. The message gives the reason."""

    of_one_rank = False


class NonFiniteLoss(RunError):
    """Training failed: losses or gradients remained infinite or NaN.

    ``batch`` holds what is needed to reproduce it: this rank's inputs, targets, names and generators.
    """

    def __init__(self, message: str, batch: dict):
        super().__init__(message)
        self.batch = batch
