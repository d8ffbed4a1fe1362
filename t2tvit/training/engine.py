"""One epoch of training, one evaluation."""

import contextlib
import math
import time
from collections.abc import Callable

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from t2tvit.errors import NonFiniteLoss
from t2tvit.models import T2TBackbone
from t2tvit.training.config import RunConfig
from t2tvit.training.distributed import World, min_over_ranks, sum_over_ranks
from t2tvit.training.pipeline import Data, Normalize, batches, begin_epoch
from t2tvit.training.progress import Progress
from t2tvit.training.state import TrainState

# How often the loss is read from the device: each time waits for all work queued there.
CHECK_EVERY = 10


def precision(config: RunConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """The autocast context of ``config.amp``."""
    if config.amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.amp))


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
) -> dict[str, float]:
    """Train to the end of the epoch, from its step ``state.step`` on.

    ``after_step`` is called where ``state`` is whole, and what it raises ends the epoch.

    Returns:
        ``train_loss`` and ``images_per_second`` over all ranks, ``lr`` of the last update.

    Raises:
        NonFiniteLoss: the message names the step.
    """
    mix = mixing(config, state.model.num_classes)
    loss_function = LabelSmoothingCrossEntropy(config.smoothing)
    if mix is not None:
        loss_function = SoftTargetCrossEntropy()
    begin_epoch(data.train, state.epochs_done, state.step)
    state.network.train()
    started, before = time.perf_counter(), state.images
    total = torch.as_tensor(state.loss_sum, dtype=torch.float64, device=world.device)
    first_bad = torch.full((), math.inf, device=world.device)
    for images, labels in batches(data.train):
        state.scheduler.step_update(state.updates)
        images, targets = data.augment(images), labels.to(world.device, non_blocking=True)
        if mix is not None:
            images, targets = mix(images, targets)
        with precision(config, world.device):
            loss = loss_function(state.network(images), targets)
        update(state, loss, config.clip_grad)
        state.updates += 1
        state.step += 1
        total = total + loss.detach() * len(labels)
        state.loss_sum = total
        state.images += len(labels)
        first_bad = first_bad.minimum(
            torch.where(torch.isfinite(loss.detach()), math.inf, float(state.step))
        )
        if state.step % CHECK_EVERY == 0 or state.step == len(data.train):
            check_finite(min_over_ranks(world, first_bad), state)
            rate = (state.images - before) * world.size / (time.perf_counter() - started)
            mean = total.item() / state.images
            progress.show(state.step, f"loss {mean:.3f}, {rate:,.0f} images/s")
        after_step(state)
    sums = torch.stack([total, total.new_tensor(state.images), total.new_tensor(before)])
    loss_sum, images, before = sum_over_ranks(world, sums).tolist()
    return {
        "train_loss": loss_sum / images,
        "images_per_second": (images - before) / (time.perf_counter() - started),
        "lr": max(group["lr"] for group in state.optimizer.param_groups),
    }


def update(state: TrainState, loss: Tensor, clip_grad: float | None) -> None:
    """Backward pass, optimiser step and average."""
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    if clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema is not None:
        state.ema.update(state.model, step=state.updates + 1)


def check_finite(first_bad: Tensor, state: TrainState) -> None:
    step = first_bad.item()
    if step < math.inf:
        kept = "; the last checkpoint is intact" if state.epochs_done > 0 else ""
        raise NonFiniteLoss(
            f"the loss is not finite at step {step:.0f} of epoch {state.epochs_done + 1}{kept}. "
            "Lower --lr, set --clip-grad, or use --amp bfloat16 or none"
        )


@torch.no_grad()
def evaluate(
    model: T2TBackbone,
    loader: DataLoader,
    normalize: Normalize,
    config: RunConfig,
    world: World,
) -> dict[str, float]:
    """Mean loss and accuracy in percent over all ranks, each image counted once.

    Returns:
        ``eval_loss``, ``top1``, with five classes or more ``top5``, and ``eval_images``.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    started = time.perf_counter()
    with Progress("evaluation", len(loader), world) as progress:
        for step, (images, labels) in enumerate(batches(loader), start=1):
            labels = labels.to(world.device, non_blocking=True)
            with precision(config, world.device):
                logits = model(normalize(images)).float()
            ranked = logits.topk(min(5, model.num_classes)).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            count = ranked.new_tensor(len(labels), dtype=torch.float64)
            sums += torch.stack(
                [loss.double(), ranked[:, 0].sum().double(), ranked.sum().double(), count]
            )
            if step % CHECK_EVERY == 0:
                rate = sums[3].item() * world.size / (time.perf_counter() - started)
                progress.show(step, f"{rate:,.0f} images/s")
    loss, first, five, count = sum_over_ranks(world, sums).tolist()
    result = {"eval_loss": loss / count, "top1": 100 * first / count}
    if model.num_classes >= 5:
        result["top5"] = 100 * five / count
    return result | {"eval_images": int(count)}
