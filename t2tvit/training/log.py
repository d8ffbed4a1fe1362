"""The log lines of a run."""

import os
import shlex
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from t2tvit.data.images import describe_skipped
from t2tvit.training.checkpointing.file_names import (
    BEST_FILE,
    CONFIG_FILE,
    CURVES_FILE,
    LAST_FILE,
    METRICS_FILE,
    RUN_FILE,
    STATE_FILES,
)
from t2tvit.training.checkpointing.identity import REMEDIES
from t2tvit.training.environment import describe_device, versions
from t2tvit.training.model import backend_lines
from t2tvit.training.pipeline import is_stream
from t2tvit.training.profiling import TRACE_FILE
from t2tvit.training.trackers import TENSORBOARD_FOLDER

if TYPE_CHECKING:
    from t2tvit.training.trainer import Trainer

CONTENTS = {
    BEST_FILE: "weights of the best epoch",
    LAST_FILE: "weights of the last epoch",
    STATE_FILES: "training state, for --resume",
    METRICS_FILE: "metrics of each epoch",
    CURVES_FILE: "learning curves",
    CONFIG_FILE: "the resolved configuration",
    RUN_FILE: "commands, versions, commit, devices",
    TRACE_FILE: "profile",
    TENSORBOARD_FOLDER: "for tensorboard --logdir",
    "wandb": "for wandb sync",
}
MUCH_WAITING = 0.2  # share of the time


def opening_lines(trainer: "Trainer") -> Iterator[str]:
    """The first lines of the log: versions, device, data, model, batch and backends."""
    config, data, world = trainer.config, trainer.data, trainer.world
    height, width = config.size
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    yield ", ".join(f"{name} {version}" for name, version in versions().items())
    yield f"device    {describe_device(world.device)}, world size {world.size}, amp {config.amp}"
    yield (
        f"data      {config.data}: {len(data.split.images):,} training and "
        f"{data.held_out_images:,} held-out images, {len(data.split.class_names)} classes, "
        f"{data.split.channels} × {height} × {width}"
    )
    if data.skipped:
        yield f"          {describe_skipped(data.skipped)}"
    yield f"model     {config.model}, {parameters:,} parameters"
    if config.initial_checkpoint is not None:
        yield f"          from the weights of {config.initial_checkpoint}"
    share = config.batch_per_process(world.size)
    batch = share * world.size
    yield (
        f"training  {trainer.epochs} epochs of {len(data.train)} updates, global batch {batch} "
        f"({share} per process), {config.optimizer}, lr {config.lr * config.lr_factor:g}, weight decay "
        f"{config.weight_decay:g}"
    )
    if config.auto_lr:
        yield (
            f"          lr {config.lr:g} for batches of {config.lr_batch_size}, scaled by "
            f"{config.lr_factor:g} to {config.batch_size}"
        )
    if batch != config.batch_size:
        yield (
            f"warning   {world.size} processes cannot divide a batch of {config.batch_size}: each "
            f"update uses {batch} images, with the same learning rate"
        )
    yield f"backends  --fused-kernels={config.fused_kernels}"
    yield from backend_lines(trainer.model, config, world.device)


def change_lines(trainer: "Trainer", before: dict) -> Iterator[str]:
    """The changes from ``before``, the configuration of the run to resume."""
    config = trainer.config
    is_amid_stream = is_stream(trainer.data.split.images) and trainer.step > 0
    if is_amid_stream and before["workers"] != config.workers:
        yield (
            f"warning   the order of shards depends on --workers, {config.workers} instead of "
            f"{before['workers']}: the rest of this epoch repeats some images and leaves others out"
        )
    for key in sorted(REMEDIES):
        if before[key] != getattr(config, key):
            yield f"{key:<9} {getattr(config, key)} instead of {before[key]}"
    if before["epochs"] != config.epochs:
        yield f"epochs    {config.epochs} instead of {before['epochs']}: the cosine schedule changes from here"


def loader_line(metrics: dict, workers: int) -> str:
    """The throughput of the loader, and what to do if training waits for it."""
    wait = metrics["loader_wait"]
    hint = ""
    if wait > MUCH_WAITING:
        hint = (
            f": it is the bottleneck; raise --workers ({os.cpu_count()} CPUs here), or store "
            "smaller images"
        )
    return (
        f"loader    {workers} workers per process can deliver "
        f"{metrics['loader_images_per_second']:,.0f} images/s; training waited for them "
        f"{wait:.0%} of the time{hint}"
    )


def closing_lines(history: list[dict], best_epoch: int, epochs: int, output: Path) -> Iterator[str]:
    """The result of a finished run and its files; BEST_FILE is from ``best_epoch``."""
    best = history[best_epoch - 1]
    time = timedelta(seconds=round(sum(metrics["seconds"] for metrics in history)))
    yield (
        f"finished {epochs} epochs in {time}: best top-1 {best['top1']:.2f}% in epoch "
        f"{best['epoch']}, last {history[-1]['top1']:.2f}%"
    )
    for name, what in CONTENTS.items():
        found = sorted(path.name for path in output.glob(name))
        if found:
            yield f"  {output / found[-1]!s:<50}  {what}"
    yield f"  t2tvit eval --run {shlex.quote(str(output))}  measures the best weights again"


def epoch_line(metrics: dict, epochs: int, left: float) -> str:
    """A line with an epoch's metrics and the seconds ``left`` to the end of the run."""
    top5 = f"  top-5 {metrics['top5']:6.2f}%" if "top5" in metrics else ""
    return (
        f"epoch {metrics['epoch']:>{len(str(epochs))}}/{epochs}  loss {metrics['train_loss']:.4f}  "
        f"held-out loss {metrics['eval_loss']:.4f}  top-1 {metrics['top1']:6.2f}%{top5}  "
        f"{metrics['images_per_second']:,.0f} images/s  lr {metrics['lr']:.2e}  "
        f"{metrics['seconds']:.1f} s  {metrics['memory_mib']:,.0f} MiB"
        + (f"  {timedelta(seconds=round(left))} left" if left else "")
    )
