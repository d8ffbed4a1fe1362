"""Errors; the command line turns an InputError into one line and exit status 2."""

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
    """An InputError that other processes of the run need not meet, such as an unreadable image."""

    of_one_rank = True


class SaidElsewhere(Exception):
    """This process ends, with ``status``, because of an error that another process reports."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class RunError(RuntimeError):
    """A command broke down while it ran, by no fault of its input. The message says how."""

    of_one_rank = False


class NonFiniteLoss(RunError):
    """Training broke down: losses or gradients stayed infinite or not a number.

    ``batch`` holds what reproduces it: this rank's inputs, targets, indices and generators.
    """

    def __init__(self, message: str, batch: dict):
        super().__init__(message)
        self.batch = batch
