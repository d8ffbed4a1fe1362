"""One epoch of training, one evaluation."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function
from torch.utils.data import DataLoader, IterableDataset

from t2tvit.errors import InputError, NonFiniteLoss, OneRankError
from t2tvit.terminal import printable
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World
from t2tvit.training.keeper import Keeper
from t2tvit.training.pipeline import Data, Normalize, batches, begin_epoch
from t2tvit.training.progress import Progress, peak_memory
from t2tvit.training.samples import Sample
from t2tvit.training.state import TrainState, rng_state

# How often the loss is read from the device: each time waits for all work queued there.
CHECK_EVERY = 10


def mixing(config: RunConfig, num_classes: int) -> Mixup | None:
    """Mixup and cutmix of a batch, with soft targets; None where both are off."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        switch_prob=config.mixup_switch,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def train_epoch(
    state: TrainState,
    data: Data,
    config: RunConfig,
    world: World,
    progress: Progress,
    after_step: Callable[[TrainState], None],
    waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, float]:
    """Train to the end of the epoch, from its step ``state.step`` on.

    ``after_step`` is called where ``state`` is whole, and what it raises ends the epoch. Each batch
    is waited for inside ``waiting()``.

    Returns:
        ``train_loss`` and ``images_per_second`` over all ranks; ``loader_images_per_second`` that
        their workers could deliver, by the time that each image took them, and ``loader_wait``,
        the share of the time for which the training waited for them; ``memory_mib``, the most
        that rank 0 has used so far; ``lr`` of the last update,
        ``skipped_updates``, for which the loss or gradient was not finite, and
        ``unreadable_images``, found so far.

    Raises:
        NonFiniteLoss: more than ``config.max_skipped`` updates in a row had to be skipped.
        OneRankError: too many images cannot be read.
    """
    mix = mixing(config, state.model.num_classes)
    loss_function = LabelSmoothingCrossEntropy(config.smoothing)
    if mix is not None:
        loss_function = SoftTargetCrossEntropy()
    begin_epoch(data.train, state.epochs_done, state.step)
    state.network.train()
    state.loss_sum = torch.as_tensor(state.loss_sum, dtype=torch.float64, device=world.device)
    clock = LoaderClock(state.images)
    items = awaited("wait for the loader", batches(data.train), waiting)
    for sample in clock.timed(items):
        note_unreadable(state, sample.problem, config, world)
        with record_function("augment"):
            images = data.augment(sample.image)
            targets = sample.label.to(world.device, non_blocking=True)
            if mix is not None:
                images, targets = mix(images, targets)
        learn(state, images, targets, sample, loss_function, config, len(data.train), world)
        if state.step % CHECK_EVERY == 0 or state.step == len(data.train):
            progress.show(state.step, training_line(state, clock, world))
        after_step(state)
    return epoch_metrics(state, clock, data, world)


class LoaderClock:
    """Measures how long training waits for its loader, and how long the images take to be read.

    ``images_before`` are the epoch's images of before this process began.
    """

    def __init__(self, images_before: int):
        self.images_before = images_before
        self.started = time.perf_counter()
        self.waited = self.reading = 0.0

    def timed(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """``samples``; the time until each of them comes is counted."""
        asked = time.perf_counter()
        for sample in samples:
            self.waited += time.perf_counter() - asked
            self.reading += sample.seconds.sum().item()
            yield sample
            asked = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.started


def training_line(state: TrainState, clock: LoaderClock, world: World) -> str:
    """How the epoch at hand goes."""
    rate = (state.images - clock.images_before) * world.size / clock.seconds
    mean = float(state.loss_sum) / max(state.images, 1)
    wait = clock.waited / clock.seconds
    memory = peak_memory(world.device)
    return f"loss {mean:.3f}, {rate:,.0f} images/s, loader {wait:.0%}, {memory:,.0f} MiB"


def epoch_metrics(
    state: TrainState, clock: LoaderClock, data: Data, world: World
) -> dict[str, float]:
    """What :func:`train_epoch` returns."""
    seconds = clock.seconds
    own = [state.loss_sum.item(), state.images, clock.images_before, clock.waited, clock.reading]
    sums = world.sum(state.loss_sum.new_tensor(own))
    loss_sum, images, before, waited, reading = sums.tolist()
    readers = max(data.train.num_workers, 1) * world.size
    return {
        "train_loss": loss_sum / images,
        "images_per_second": (images - before) / seconds,
        "loader_images_per_second": readers * (images - before) / max(reading, 1e-9),
        "loader_wait": waited / world.size / seconds,
        "memory_mib": peak_memory(world.device),
        "lr": max(group["lr"] for group in state.optimizer.param_groups),
        "skipped_updates": state.skipped,
        "unreadable_images": len(set().union(*world.gather(state.unreadable))),
    }


def learn(
    state: TrainState,
    images: Tensor,
    targets: Tensor,
    sample: Sample,
    loss_function: nn.Module,
    config: RunConfig,
    steps: int,
    world: World,
) -> None:
    """Make one of the epoch's ``steps`` updates, or skip it if its loss or gradient is not finite.

    Raises:
        NonFiniteLoss: it is one skipped update too many.
    """
    state.scheduler.step_update(state.updates)
    generators = rng_state(world.device)
    buffers = [(value, value.clone()) for value in state.model.buffers()]
    loss = accumulate(state, images, targets, loss_function, config, world)
    if update(state, config.clip_grad):
        state.skipped_in_a_row, state.diverging = 0, False
        state.loss_sum = state.loss_sum + loss * len(images)
        state.images += len(images)
    else:
        for value, before_update in buffers:  # batch norm's statistics among them
            value.copy_(before_update)
        names = sample.name.tolist() if isinstance(sample.name, Tensor) else sample.name
        batch = {"images": images, "targets": targets, "rng": generators, "names": names}
        report_skipped(state, loss.item(), batch, config, steps, world)
    state.updates += 1
    state.step += 1


def note_unreadable(
    state: TrainState, problems: list[str], config: RunConfig, world: World
) -> None:
    """Name the images that could not be read, each once.

    Raises:
        OneRankError: more than ``config.max_unreadable`` have been found on this rank.
    """
    for problem in filter(None, problems):
        if problem in state.unreadable:
            continue
        state.unreadable.add(problem)
        if len(state.unreadable) > config.max_unreadable:
            raise OneRankError(
                f"{len(state.unreadable)} training images cannot be read, the last: {problem}; or "
                "raise --max-unreadable"
            )
        line = f"warning   process {world.rank}: {problem}; the next image replaces it"
        print(printable(line), flush=True)


def awaited(
    name: str, items: Iterable, waiting: Callable[[], contextlib.AbstractContextManager]
) -> Iterator:
    """``items``; each is waited for inside ``waiting()``, and a profile names the time it takes."""
    items = iter(items)
    while True:
        with record_function(name), waiting():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def accumulate(
    state: TrainState,
    images: Tensor,
    targets: Tensor,
    loss_function: nn.Module,
    config: RunConfig,
    world: World,
) -> Tensor:
    """Put the gradients of the mean loss in place, from ``config.accumulate`` pieces of the batch.

    Returns:
        The mean loss of this rank's images; the gradients are those of all ranks.
    """
    state.optimizer.zero_grad()
    pieces = list(
        zip(
            images.tensor_split(config.accumulate),
            targets.tensor_split(config.accumulate),
            strict=True,
        )
    )
    total = torch.zeros((), device=world.device)
    for number, (part, wanted) in enumerate(pieces, start=1):
        # The ranks share their gradients once, with the last piece's.
        alone = world.size > 1 and number < len(pieces)
        with state.network.no_sync() if alone else contextlib.nullcontext():
            try:
                with record_function("forward"), config.autocast(world.device):
                    loss = loss_function(state.network(part), wanted) * (len(part) / len(images))
            except InputError:
                raise
            except ValueError as error:  # PyTorch's and timm's of shapes; the rest are faults
                raise InputError(
                    f"model {config.model} does not train on {len(part)} images of "
                    f"{tuple(part.shape[1:])}: {error}; change --batch-size, --accumulate or --model"
                ) from None
            with record_function("backward"):
                # A loss that is not finite on one rank so reaches the gradients of all.
                state.scaler.scale(loss * (1 + 0 * loss.detach())).backward()
        total += loss.detach()
    return total


@record_function("optimiser")
def update(state: TrainState, clip_grad: float | None) -> bool:
    """Optimiser step and average; False, and no step, if a gradient is not finite.

    Every rank returns the same.
    """
    state.scaler.unscale_(state.optimizer)
    parameters = [value for value in state.model.parameters() if value.grad is not None]
    norm = nn.utils.get_total_norm([value.grad for value in parameters])
    if clip_grad is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
    is_finite = norm.isfinite().item()
    if is_finite:
        state.scaler.step(state.optimizer)
    state.scaler.update()
    if is_finite and state.ema is not None:
        state.ema.update(state.model, step=state.updates + 1)
    return is_finite


def report_skipped(
    state: TrainState, loss: float, batch: dict, config: RunConfig, steps: int, world: World
) -> None:
    """Count the skipped update of ``batch`` and say whose it was.

    Raises:
        NonFiniteLoss: it is one too many.
    """
    state.skipped += 1
    state.skipped_in_a_row += 1
    where = f"step {state.step + 1} of epoch {state.epochs_done + 1}"
    ranks = world.gather((loss, batch["names"]))
    bad = {rank: entry for rank, entry in enumerate(ranks) if not math.isfinite(entry[0])}
    # A loss scale that is too large is found so, and is no fault of the batch.
    state.diverging = bool(bad) or not state.scaler.is_enabled()
    what = "the loss is not finite" if bad else "the gradient is not finite"
    whose = "; ".join(
        f"rank {rank}: loss {value}, training images {' '.join(map(str, names))}"
        for rank, (value, names) in (bad or dict(enumerate(ranks))).items()
    )
    if state.skipped_in_a_row > config.max_skipped or state.skipped == steps:
        kept = "; the last checkpoint is intact" if state.epochs_done > 0 else ""
        raise NonFiniteLoss(
            f"{what} at {where}, {state.skipped_in_a_row} times in a row ({whose}){kept}. "
            "Lower --lr, set --clip-grad, or use --amp bfloat16 or none",
            batch,
        )
    if state.diverging:
        world.say(f"warning   {what} at {where} ({whose}); update skipped")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    normalize: Normalize,
    config: RunConfig,
    world: World,
    keeper: Keeper | None = None,
) -> dict[str, float]:
    """Mean loss and accuracy in percent over all ranks, each image counted once.

    An image whose logits are not all finite counts as wrong; the loss is then not finite. With
    ``keeper``, a signal ends the evaluation on all ranks.

    Returns:
        ``eval_loss``, ``top1``, with five classes or more ``top5``, and ``eval_images``.

    Raises:
        Stopped: on every rank, if ``keeper`` knows of a signal on any.
    """
    world.share_buffers(model)
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    started = time.perf_counter()
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    items = batches(loader) if keeper is None else keeper.until_stopped(batches(loader))
    with Progress("evaluation", None if is_stream else len(loader), world) as progress:
        for step, (images, labels) in enumerate(items, start=1):
            labels = labels.to(world.device, non_blocking=True)
            with config.autocast(world.device):
                logits = model(normalize(images)).float()
            ranked = logits.topk(min(5, model.num_classes)).indices == labels[:, None]
            ranked &= logits.isfinite().all(dim=1, keepdim=True)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            count = ranked.new_tensor(len(labels), dtype=torch.float64)
            sums += torch.stack(
                [loss.double(), ranked[:, 0].sum().double(), ranked.sum().double(), count]
            )
            if step % CHECK_EVERY == 0:
                rate = sums[3].item() * world.size / (time.perf_counter() - started)
                progress.show(step, f"{rate:,.0f} images/s")
    if keeper is not None:
        keeper.after_evaluation()
    loss, first, five, count = world.sum(sums).tolist()
    result = {"eval_loss": loss / count, "top1": 100 * first / count}
    if model.num_classes >= 5:
        result["top5"] = 100 * five / count
    return result | {"eval_images": int(count)}
