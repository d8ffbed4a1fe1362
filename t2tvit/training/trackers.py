"""Optional reports of the metrics of each epoch: TensorBoard, Weights & Biases."""

import secrets
from pathlib import Path

from t2tvit.errors import InputError
from t2tvit.files import write_atomically
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World

TENSORBOARD_FOLDER, ID_FILE = "tensorboard", "wandb_id.txt"


def run_id(output: Path) -> str:
    """The run's id at Weights & Biases, created at its first start and stored in ``output``."""
    path = output / ID_FILE
    if not path.is_file():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text()


def check_trackers(tensorboard: bool, project: str | None) -> None:
    """Raise an InputError if a requested tracker is not installed."""
    try:
        if tensorboard:
            import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise InputError("tensorboard: not installed; pip install tensorboard") from None
    try:
        if project is not None:
            import wandb  # noqa: F401
    except ImportError:
        raise InputError("wandb: not installed; pip install wandb") from None


class Trackers:
    """The trackers of ``config.tensorboard`` and ``config.wandb``, on rank 0.

    Args:
        output: The run's folder; nothing is written outside of it.
        config: Stored with the run at Weights & Biases.
        epochs_done: TensorBoard's records of later epochs, from before an interruption, are replaced.
        world: Other ranks do nothing.
    """

    def __init__(self, output: Path, config: RunConfig, epochs_done: int, world: World):
        self.writer = self.run = None
        if config.tensorboard and world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(output / TENSORBOARD_FOLDER)
            self.writer = SummaryWriter(folder, purge_step=epochs_done + 1)
        if config.wandb is not None and world.is_main:
            import wandb

            place = output.resolve()
            self.run = wandb.init(
                project=config.wandb,
                dir=str(place),
                name=f"{place.parent.name}/{place.name}",
                id=run_id(output),
                resume="allow",
                config=vars(config),
            )

    def close(self, failed: bool = False) -> None:
        """End the reports; ``failed`` says whether an error ended the run."""
        if self.writer is not None:
            self.writer.close()
        if self.run is not None:
            self.run.finish(exit_code=int(failed))

    def epoch(self, metrics: dict) -> None:
        """Report an epoch's numbers."""
        numbers = {name: value for name, value in metrics.items() if name != "epoch"}
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, metrics["epoch"])
            self.writer.flush()
        if self.run is not None:
            self.run.log(numbers, step=metrics["epoch"])
