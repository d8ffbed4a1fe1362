"""A whole run: builds the trainer from a configuration and a folder, and trains."""

from dataclasses import asdict

import torch

from t2tvit.errors import InputError
from t2tvit.training.checkpointing import Checkpointer, RunFolder, Weights
from t2tvit.training.checkpointing.identity import REMEDIES
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.log import change_lines, opening_lines
from t2tvit.training.model import trainable_model
from t2tvit.training.pipeline import open_data, open_splits
from t2tvit.training.randomness import seed_everything
from t2tvit.training.stopping import Signals, obeying
from t2tvit.training.trackers import check_trackers
from t2tvit.training.trainer import Trainer


def train(
    config: RunConfig, folder: RunFolder, world: World, signals: Signals, runs: int = 1
) -> None:
    """Train to the last epoch of ``config``, writing only into ``folder``.

    Args:
        config: The configuration as given, before it is adapted to the data.
        folder: The run's folder.
        world: The processes of the run.
        signals: An entered context manager.
        runs: The number of runs of similar length, including this one; the log estimates their time.

    Raises:
        InputError: The run cannot start; nothing is written.
        Stopped: A signal asked it to stop.
        RunError: Losses stay non-finite, or the disk is full; the last checkpoint is intact.
    """
    with folder:
        with assemble(config, folder, world, signals) as trainer:
            trainer.fit(runs)
        trainer.report()


def assemble(config: RunConfig, folder: RunFolder, world: World, signals: Signals) -> Trainer:
    """Build the trainer of a new or resumed run, claim its folder and write the first log lines.

    Nothing is written until all checks have passed.
    """
    world.on_main(folder.check)
    world.on_main(lambda: check_trackers(config.tensorboard, config.wandb))
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
    resumed = folder.read()
    if resumed is not None:
        world.on_main(lambda: folder.check_owner(resumed))
    with obeying(signals, world):
        splits = open_splits(config, None if resumed is None else resumed["class_names"])
        images = world.on_main(lambda: folder.described_images(splits, resumed))
        fitted, changes = config.fitted(len(splits[0].images))
        data = open_data(fitted, world, splits)
    seed_everything(config.seed)
    model, args = trainable_model(fitted, data.split, world, begins=resumed is None)
    statistics = {"mean": data.mean, "std": data.std}
    about = Weights(fitted.model, args, data.split.class_names, asdict(fitted) | statistics)
    checkpointer = Checkpointer(folder.output, config, about, images, world, signals)
    trainer = Trainer(fitted, world, data, model, checkpointer)
    if resumed is None:
        seed_everything(config.seed + world.rank)
    else:
        trainer.restore(resumed, folder.resumed_path)
        check_left(trainer, resumed["config"])

    trainer.best, lost = world.on_main(lambda: folder.claim(checkpointer, resumed))
    world.on_main(lambda: folder.record_start(trainer))
    for line in (*opening_lines(trainer), *changes):
        world.say(line)
    for reason in folder.damaged:
        world.say(f"warning   {reason}: resuming from {folder.state_path} instead")
    for line in lost:
        world.say(line)
    if resumed is not None:
        world.say(
            f"resumed   {folder.state_path}, after {trainer.epochs_done} epochs and {trainer.step} "
            "updates"
        )
        for line in change_lines(trainer, resumed["config"]):
            world.say(line)
    return trainer


def check_left(trainer: Trainer, before: dict) -> None:
    """Check that a resumed run, whose configuration was ``before``, has epochs left to train.

    Raises:
        InputError: It has done more than ``epochs``, or all of them and options have changed.
    """
    config, epochs, epochs_done = trainer.config, trainer.epochs, trainer.epochs_done
    if epochs_done > epochs:
        raise InputError(
            f"epochs: got {epochs}, including cool-down, but the run to resume has done "
            f"{epochs_done}; raise --epochs, or resume an older state with --resume FILE"
        )
    for key in sorted(REMEDIES):
        if epochs_done == epochs and before[key] != getattr(config, key):
            raise InputError(
                f"{key}: got {getattr(config, key)}, but the run to resume has {before[key]} and no "
                "epochs left to train; raise --epochs, or do not change it"
            )
