"""The files of a run: training states, weights, and the record of which run a folder holds."""

from t2tvit.training.checkpointing.checkpointer import Checkpointer
from t2tvit.training.checkpointing.file_names import BEST_FILE, LAST_FILE, METRICS_FILE
from t2tvit.training.checkpointing.run_folder import RunFolder
from t2tvit.training.checkpointing.weights import (
    Weights,
    read_about,
    save_weights,
    weights_file,
)

__all__ = [
    "BEST_FILE",
    "LAST_FILE",
    "METRICS_FILE",
    "Checkpointer",
    "RunFolder",
    "Weights",
    "read_about",
    "save_weights",
    "weights_file",
]
