"""Speed and memory of a model with kernels, compared with plain PyTorch and other models."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import timm.optim
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from t2t_kernels.measure import (
    interleave,
    matmul_ceiling,
    peak_allocated,
    percentiles,
    saved_bytes,
)
from t2tvit.data.sources import channels_of, open_split
from t2tvit.errors import InputError, RunError
from t2tvit.models import T2TBackbone
from t2tvit.models.timm_models import create_timm_model
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.environment import describe_device
from t2tvit.training.model import backend_lines, build_model, try_forward
from t2tvit.training.pipeline import batches, train_loader
from t2tvit.training.progress import Progress

MIB = 2**20
LARGEST_BATCH = 64  # without --batch-size: the batch of a recipe is for many GPUs
LOADER_SECONDS = 3.0


def compare_with_reference(
    config: RunConfig, num_classes: int, repetitions: int, against: Sequence[str], world: World
) -> None:
    """Measure the model of ``config`` with and without its kernels, and print the result.

    ``against`` are timm models to measure as well.
    """
    channels = channels_of(config.data)
    args = config.create_args(num_classes, channels)
    torch.manual_seed(config.seed)
    fused = build_model(config.model, args, config.fused_kernels).to(world.device)
    reference = build_model(config.model, args, "reference").to(world.device)
    reference.load_state_dict(fused.state_dict())
    try_forward(fused, config, channels, world.device)
    rivals = {
        name: create_timm_model(
            name, img_size=config.size, num_classes=fused.num_classes, in_chans=channels
        ).to(world.device)
        for name in against
    }

    for line in heading(config, channels, fused, world.device):
        print(line)
    images = torch.randn(config.batch_size, channels, *config.size, device=world.device)
    labels = torch.randint(fused.num_classes, (config.batch_size,), device=world.device)
    check_parity(fused, reference, images, config)
    models = {"reference": reference, "fused": fused} | rivals
    ceiling = matmul_ceiling(world.device, config.dtype)
    rows = []
    for name, make in (("training", training_step), ("inference", inference_step)):
        steps = {key: make(model, images, labels, config) for key, model in models.items()}
        done = itertools.count(1)
        with Progress(f"measuring {name}", repetitions * len(steps), world) as progress:
            seconds = interleave(
                steps,
                repetitions,
                world.device,
                after_each=lambda: progress.show(next(done), ""),
            )
        rates = {
            key: [config.batch_size / value for value in values] for key, values in seconds.items()
        }
        ratios = [new / old for new, old in zip(rates["fused"], rates["reference"])]
        cells = [spread(rates[key]) for key in models]
        rows.append((f"{name}, images/s", *cells[:2], spread(ratios, "×"), *cells[2:]))
        cells = []
        for key in models:
            counted = reference if key == "fused" else models[key]
            flops = flops_per_image(counted, images[:2], name == "training")
            cells.append(f"{flops * percentiles(rates[key])[0] / ceiling:.1%}")
        rows.append((f"{name}, MFU", *cells[:2], "", *cells[2:]))
    rows.append(memory_row(models, images, labels, config))
    print_table(("", "reference", "fused", "fused / reference", *rivals), rows)
    print(
        f"median of {repetitions} repetitions, taken in turns, and 20th to 80th percentile; the ratio "
        "is the median of the ratios of neighbouring turns"
    )
    print(
        "MFU: the rate of the plain model's products, relative to a large matrix product here, "
        f"{figure(ceiling / 1e12)} TFLOP/s in {str(config.dtype).removeprefix('torch.')}"
    )


def heading(
    config: RunConfig, channels: int, fused: nn.Module, device: torch.device
) -> Iterator[str]:
    """The measured model, and the backend of each operation of the fused model."""
    height, width = config.size
    options = "".join(f" {name}={value}" for name, value in config.model_args.items())
    yield (
        f"{config.model}{options}, {channels} × {height} × {width}, batch {config.batch_size}, "
        f"amp {config.amp}, {describe_device(device)}"
    )
    yield f"fused means --fused-kernels={config.fused_kernels}:"
    yield from backend_lines(fused, config, device)


def flops_per_image(model: nn.Module, images: Tensor, training: bool) -> float:
    """Operations of the products and convolutions of ``model`` per image.

    2 per multiply-add; with ``training`` including the backward. ``images`` is a batch for counting.
    """
    model.train(training)
    # The only attention that consists of products, which the counter supports on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if training:
            model(images).sum().backward()
        else:
            with torch.no_grad():
                model(images)
    return counter.get_total_flops() / len(images)


def memory_row(
    models: dict[str, nn.Module], images: Tensor, labels: Tensor, config: RunConfig
) -> tuple[str, ...]:
    """The peak allocation of a step on a GPU; on a CPU the memory saved for backward, per image."""
    used = {}
    for key, model in models.items():
        model.train()
        if images.device.type == "cuda":
            step = training_step(model, images, labels, config)
            step()
            used[key] = peak_allocated(step, images.device) / MIB
            continue
        with config.autocast(images.device):
            kept = saved_bytes(lambda: F.cross_entropy(model(images), labels), model.parameters())
        used[key] = kept / MIB / config.batch_size
    what = (
        "peak allocated, MiB" if images.device.type == "cuda" else "saved for backward, MiB/image"
    )
    cells = [f"{value:.3f}" for value in used.values()]
    return (what, *cells[:2], f"{used['fused'] / used['reference']:.2f}×", *cells[2:])


def loader_line(config: RunConfig, world: World) -> str:
    """Images per second of the training data's loader alone, including decoding and augmentation."""
    try:
        split = open_split(
            config.data, "train", img_size=config.size, num_classes=config.num_classes
        )
        loader = train_loader(split, config, world)
    except InputError as error:
        return f"loader of {config.data}: not measured: {error}"
    endless = itertools.chain.from_iterable(batches(loader) for _ in itertools.count())
    next(endless)  # start the workers
    started, seen = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < LOADER_SECONDS:
        seen += len(next(endless)[0])
    rate = figure(seen / elapsed)
    return f"loader of {config.data}, {loader.num_workers} workers, alone: {rate} images/s"


@torch.inference_mode()
def check_parity(
    fused: T2TBackbone, reference: T2TBackbone, images: Tensor, config: RunConfig
) -> None:
    """Raise a RunError unless the logits of both models for ``images`` agree up to rounding."""
    with config.autocast(images.device):
        new, old = (model.eval()(images) for model in (fused, reference))
    error = ((new.double() - old.double()).norm() / old.double().norm()).item()
    limit = 50 * torch.finfo(new.dtype).eps
    if not error <= limit:
        raise RunError(
            f"fused and reference disagree: relative error {error:.1e} of the logits, expected at "
            f"most {limit:.1e}; not timed"
        )


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, config: RunConfig
) -> Callable[[], None]:
    """A function that makes one update of ``model``."""
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=0.0)

    def step():
        model.train()
        optimizer.zero_grad()
        with config.autocast(images.device):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def inference_step(
    model: nn.Module, images: Tensor, labels: Tensor, config: RunConfig
) -> Callable[[], None]:
    """A function that classifies one batch; ``labels`` are not used."""

    @torch.inference_mode()
    def step():
        model.eval()
        with config.autocast(images.device):
            model(images)

    return step


def spread(values: list[float], unit: str = "") -> str:
    """Median and, in brackets, the 20th and 80th percentile."""
    median, low, high = percentiles(values)
    return f"{figure(median)}{unit} ({figure(low)}–{figure(high)})"


def figure(value: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        first, *others = (cell for cell in row)
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:]))
        print("  ".join((f"{first:<{widths[0]}}", *cells)))
