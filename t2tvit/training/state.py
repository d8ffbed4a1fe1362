"""What a run must not lose: its state, the weights for use, and how they reach the disk."""

import contextlib
import io
import json
import os
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from t2tvit.errors import InputError, RunError

STATE_FILE = "state.pt"
BEST_FILE = "best.safetensors"
LAST_FILE = "last.safetensors"
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
METADATA_KEY = "t2tvit"


@dataclass
class TrainState:
    """Everything that an update changes. The schedule follows from ``updates`` alone."""

    model: nn.Module
    network: nn.Module  # the model, wrapped where many ranks train it
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    updates: int = 0
    epochs_done: int = 0
    history: list[dict] = field(default_factory=list)

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged weights where there is an average, else the trained ones."""
        return self.model if self.ema is None else self.ema.module

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "updates": self.updates,
            "epochs_done": self.epochs_done,
            "history": self.history,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.updates, self.epochs_done = state["updates"], state["epochs_done"]
        self.history = state["history"]


@dataclass(frozen=True)
class Weights:
    """What a weights file says of itself: how to build its model and how to feed it.

    ``config`` is the run's RunConfig with the mean and std it used; ``top1`` is in percent.
    """

    model: str
    create_args: dict
    class_names: list[str]
    config: dict
    epoch: int = 0
    top1: float = 0.0


def save_weights(model: nn.Module, path: Path, about: Weights) -> None:
    """Write a self-describing .safetensors file that ``t2tvit.load_checkpoint`` reads."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, save(tensors, {METADATA_KEY: json.dumps(asdict(about))}))


def read_about(path: Path) -> Weights | None:
    """What a weights file says of itself; None where it is of another kind.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return Weights(**json.loads(metadata[METADATA_KEY])) if METADATA_KEY in metadata else None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise InputError(f"checkpoint {path} is damaged ({error}); use another one") from None


def save_state(
    path: Path, state: TrainState, rng: list[dict], config: dict, class_names: list[str]
) -> None:
    """Write all that resuming needs; ``rng`` is :func:`rng_state` of every rank."""
    content = {
        "state": state.state_dict(),
        "rng": rng,
        "config": config,
        "class_names": class_names,
    }
    # In memory first: torch.save hides a full disk behind an error of its own.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def read_state(path: Path) -> dict:
    """The content of :func:`save_state`; nothing in the file is executed.

    Raises:
        InputError: the file is missing, damaged, or no training state.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; is it the output of a run?") from None
    except Exception as error:  # a damaged file fails in many ways
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"training state {path} is damaged ({reason}); start again with another --output"
        ) from None
    if (
        not isinstance(content, dict)
        or not {"state", "rng", "config", "class_names"} <= content.keys()
    ):
        raise InputError(f"{path} is no training state; --resume takes a run's {STATE_FILE}")
    return content


def rng_state() -> dict:
    """The state of every generator that this process draws from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict) -> None:
    """Continue the sequences of :func:`rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Start every generator of this process from ``seed``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def write_atomically(path: Path, content: bytes | memoryview | str) -> None:
    """Replace ``path`` as a whole: a crash leaves the old file or the new one, nothing between.

    Raises:
        RunError: the disk is full, or the folder not to be written to.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        kept = "; what it held before is intact" if path.exists() else ""
        raise RunError(f"cannot write {path}: {error.strerror}{kept}") from None
