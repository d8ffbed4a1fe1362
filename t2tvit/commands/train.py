"""``t2tvit train``: trains a model, or resumes a run."""

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path

from t2tvit.commands.options import CONFIG_HELP, add_keys, given
from t2tvit.errors import InputError
from t2tvit.training.config import KEYS

HELP = "train a model, on one device or under torchrun"
EPILOG = """
examples:
  t2tvit train --output runs/digits
  t2tvit train --output runs/digits --resume auto --epochs 60
  t2tvit train --config imagenet/t2t_vit_14 --data imagefolder:PATH --output runs/t2t_vit_14
  torchrun --nproc_per_node=8 -m t2tvit train --config imagenet/t2t_vit_14 --output runs/t2t_vit_14
  t2tvit train --output runs/digits --compile --accumulate 2 --profile
  t2tvit train --config transfer/cifar10 --data cifar10:PATH --initial-checkpoint FILE --output DIR
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="NAME",
        help=f"{CONFIG_HELP}. Options override it. The default is digits if the data is digits. Keys "
        "that it does not set have the defaults below",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="the folder for all output: weights (best and last), training state, metrics, curves",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: resume the run in --output, or start it; PATH: resume that run or training state",
    )
    add_keys(parser, KEYS)


def run(arguments: argparse.Namespace) -> None:
    """Run the training of the parsed arguments.

    Raises:
        InputError: Invalid input.
        BackendUnavailable: The named backend cannot run.
        RunError: Losses remain non-finite, or the disk is full; the last checkpoint is intact.
    """
    from t2tvit.training import distributed
    from t2tvit.training.checkpointing import RunFolder
    from t2tvit.training.run import train
    from t2tvit.training.stopping import Signals, Stopped

    device, failure = vars(arguments).get("device", "auto"), None
    try:
        folder = RunFolder.find(arguments.output, arguments.resume)
        config = folder.choose_config(arguments.config, given(arguments))
        device = config.device
    except InputError as error:
        failure = error
    with distributed.joined(device, failure) as world:
        state = folder.state_path and folder.state_path.name
        shared = {"--output": str(folder.output), "--resume": state} | asdict(config)
        world.check_same(shared)
        try:
            with Signals() as signals:
                train(config, folder, world, signals)
        except Stopped as stopped:
            kept = "all progress is saved" if stopped.is_kept else "the last good state is kept"
            world.say(f"stopped by a signal; {how_to_resume(folder.output, kept)}")
            stopped.end_elsewhere()
        except KeyboardInterrupt:
            world.say(f"interrupted; {how_to_resume(folder.output, 'the last checkpoint is kept')}")
            raise


def how_to_resume(output: Path, kept: str) -> str:
    """A message with what is ``kept`` of the stopped run in ``output`` and how to resume it."""
    from t2tvit.training.checkpointing.run_folder import read_record
    from t2tvit.training.checkpointing.states import states_in

    if not states_in(output) and not read_record(output):
        return "training had not started. Repeat the command to start it"
    return f"{kept}. Resume with: t2tvit train --output {shlex.quote(str(output))} --resume auto"
