"""The runs of a comparison: the cost of each model, and training one after the other."""

import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from t2tvit.comparison.plan import Comparison, place_of
from t2tvit.data.sources import channels_of, open_split
from t2tvit.models.cost import multiply_adds
from t2tvit.training.checkpointing import RunFolder
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.model import build_model, try_forward
from t2tvit.training.progress import duration
from t2tvit.training.run import train
from t2tvit.training.stopping import Signals


def cost(config: RunConfig, world: World) -> tuple[int, int]:
    """Parameters and multiply-adds of a model; also checks that it runs."""
    model, channels = built(config, world)
    try_forward(model, config, channels, world.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, multiply_adds(model, config.size, channels)


def built(config: RunConfig, world: World) -> tuple[torch.nn.Module, int]:
    """The model of a configuration with new weights, and the channels of its images."""
    channels = channels_of(config.data)
    classes = config.num_classes
    if classes is None:
        classes = len(open_split(config.data, "val", img_size=config.size).class_names)
    args = config.create_args(classes, channels)
    return build_model(config.model, args, config.fused_kernels).to(world.device), channels


def train_all(comparison: Comparison, output: Path, world: World) -> None:
    """Train every model with every seed; interrupted runs are resumed.

    Raises:
        Stopped: A signal asked to stop; the state is saved.
        InputError: ``output`` holds a run with another configuration.
    """
    runs = comparison.runs()
    started = time.perf_counter()
    whole: list[float] = []
    for number, (name, seed) in enumerate(runs, 1):
        world.say("")
        left = len(runs) - number + 1
        times = ""
        if whole:
            times = f"; {duration(time.perf_counter() - started)} so far"
            times += f", about {duration(statistics.mean(whole) * left)} left"
        world.say(f"run {number} of {len(runs)}: {name}, seed {seed}{times}")
        torch._dynamo.reset()  # so that the limit on compiled graphs applies to each model separately
        folder = RunFolder.find(place_of(output, name, seed), "auto")
        config = replace(comparison.models[name], seed=seed)
        with Signals() as signals:
            begun = time.perf_counter()
            train(folder.choose_config(None, asdict(config)), folder, world, signals, left)
            if folder.state_path is None:
                whole.append(time.perf_counter() - begun)
