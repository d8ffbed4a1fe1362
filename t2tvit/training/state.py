"""What a run must not lose: its state, the weights for use, and how they reach the disk."""

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from t2tvit.errors import InputError
from t2tvit.files import read_bytes, write_atomically
from t2tvit.models.described import check_described
from t2tvit.models.reading import SAFETENSORS, kind_of
from t2tvit.training.form import check, is_number, is_text

BEST_FILE = "best.safetensors"
LAST_FILE = "last.safetensors"
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
METADATA_KEY = "t2tvit"
# The other devices are asked only where they are used: asking opens a context on a GPU.
CPU = torch.device("cpu")


@dataclass
class TrainState:
    """Everything that an update changes. The schedule follows from ``updates`` alone.

    ``step`` batches of the epoch at hand are done; ``loss_sum`` over their ``images`` is this
    rank's, as is ``unreadable``, what is wrong with images; all else is the same on every rank.
    ``skipped`` counts the epoch's updates that were not made. ``diverging`` says that the last one
    was not made, for another reason than a loss scale that is too large.
    """

    model: nn.Module
    network: nn.Module  # the model, wrapped where many ranks train it
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    scaler: torch.amp.GradScaler
    updates: int = 0
    epochs_done: int = 0
    step: int = 0
    loss_sum: torch.Tensor | float = 0.0
    images: int = 0
    unreadable: set[str] = field(default_factory=set)
    skipped: int = 0
    skipped_in_a_row: int = 0
    diverging: bool = False
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
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "history": self.history,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        # Parameters are numbered, and JSON's keys are text.
        moments = {int(number): each for number, each in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict(state["optimizer"] | {"state": moments})
        if state["scaler"]:  # empty if the run did not scale its loss before
            self.scaler.load_state_dict(state["scaler"])
        self.updates, self.epochs_done = state["updates"], state["epochs_done"]
        self.step, self.history = state["step"], state["history"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def end_epoch(self, metrics: dict) -> None:
        """Count the epoch at hand as done."""
        self.epochs_done += 1
        self.step, self.loss_sum, self.images, self.skipped = 0, 0.0, 0, 0
        self.history.append(metrics)


@dataclass(frozen=True)
class Weights:
    """What a weights file says of itself: how to build its model and how to feed it.

    ``config`` is the run's RunConfig with the mean and std it used; ``top1`` is in percent.
    """

    model: str
    create_args: dict
    class_names: list[str] | None
    config: dict
    epoch: int = 0
    top1: float = 0.0


def save_weights(model: nn.Module, path: Path, about: Weights) -> None:
    """Write a self-describing .safetensors file that ``t2tvit.load_checkpoint`` reads."""
    write_atomically(path, weights_file(model, about))


def weights_file(model: nn.Module, about: Weights) -> bytes:
    """The content of :func:`save_weights`' file."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    return tensors_file(tensors, METADATA_KEY, asdict(about))


def read_about(path: Path) -> Weights | None:
    """What a weights file says of itself; None if it does not say what model it is of.

    Raises:
        InputError: the file is missing, damaged or no file of weights, or describes a model that
            its weights are not of, or with arguments that a file may not set.
    """
    if kind_of(path) != SAFETENSORS:
        return None
    try:
        content, _ = read_tensors(path, METADATA_KEY)
        about = None if content is None else Weights(**content)
        if about is not None:
            _check_about(about)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"checkpoint {path} is damaged ({error}); use another one") from None
    if about is not None:
        check_described(about.model, about.create_args, path.stat().st_size, str(path))
    return about


def _check_about(about: Weights) -> None:
    """Raise a ValueError unless ``about`` has values that a run writes."""
    if about.config.get("model", about.model) != about.model:
        raise ValueError("it names two models")
    classes = about.class_names
    if classes is not None:
        check(classes, [is_text], "class_names")
        if len(classes) > about.create_args.get("num_classes", len(classes)):
            raise ValueError(f"it names {len(classes)} classes, more than its model has")
    for name in ("epoch", "top1"):
        check(getattr(about, name), is_number, name)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], key: str, content: object) -> None:
    """Write a .safetensors file whose metadata has ``content`` and a checksum of all under ``key``.

    Raises:
        RunError: the disk is full, or the folder not to be written to.
    """
    # In memory first, so that a full disk is met where it is reported.
    write_atomically(path, tensors_file(tensors, key, content))


def tensors_file(tensors: dict[str, torch.Tensor], key: str, content: object) -> bytes:
    """The content of :func:`write_tensors`' file."""
    text = json.dumps(content)
    tensors = unshared(tensors)
    # One entry: safetensors writes several in any order, and equal runs should give equal files.
    metadata = {key: json.dumps({"sha256": digest(tensors, text), "content": text})}
    return save(tensors, metadata)


def read_tensors(path: Path, key: str) -> tuple[object | None, dict[str, torch.Tensor]]:
    """The content and tensors of :func:`write_tensors`; None and nothing from another's file.

    Raises:
        FileNotFoundError, SafetensorError, ValueError: the file is missing or damaged.
    """
    # Not by safe_open, which takes no path that is not UTF-8.
    content = read_bytes(path)
    tensors = load(content)
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    metadata = json.loads(header).get("__metadata__") or {}
    if key not in metadata:
        return None, {}
    stored = _parsed(metadata[key])
    if not isinstance(stored, dict) or not isinstance(stored.get("content"), str):
        raise ValueError("its metadata has no checksum")
    if stored.get("sha256") != digest(tensors, stored["content"]):
        raise ValueError("its checksum is not that of its content")
    return _parsed(stored["content"]), tensors


def _parsed(text: str) -> object:
    """What JSON says; a ValueError for what is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its metadata is nested too deeply") from None


def unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values, each in memory of its own, as safetensors wants tied weights."""
    seen, result = set(), {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        result[name] = value.clone() if place in seen else value
        seen.add(place)
    return result


def digest(tensors: dict[str, torch.Tensor], text: str) -> str:
    """SHA-256 of ``text`` and of every tensor's name, dtype, shape and bytes."""
    result = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        result.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        result.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()


def rng_state(device: torch.device = CPU) -> dict:
    """The state of every generator that this process, which computes on ``device``, draws from."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict, device: torch.device = CPU) -> None:
    """Continue the sequences of :func:`rng_state` on ``device``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int) -> None:
    """Start every generator of this process from ``seed``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def drawing_from(*entropy: int) -> Iterator[None]:
    """Draw on the CPU from generators that ``entropy`` seeds; afterwards they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
