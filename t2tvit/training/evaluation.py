"""Loss and accuracy of a model on held-out images."""

import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from t2tvit.training.checkpointing import Checkpointer
from t2tvit.training.config import OptimizerConfig
from t2tvit.training.distributed import World
from t2tvit.training.pipeline import Normalize, batches
from t2tvit.training.progress import Progress

# Steps between reads of the counts; each read waits for all work queued on the device.
CHECK_EVERY = 10


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    normalize: Normalize,
    config: OptimizerConfig,
    world: World,
    checkpointer: Checkpointer | None = None,
) -> dict[str, float]:
    """Mean loss and accuracy in percent over all ranks, each image counted once.

    An image with a logit that is not finite counts as wrong, and the loss is then not finite. With
    ``checkpointer``, a signal ends the evaluation on all ranks.

    Returns:
        ``eval_loss``, ``top1``, ``top5`` if there are at least five classes, and ``eval_images``.

    Raises:
        Stopped: On every rank, if any rank has received a signal.
    """
    world.share_buffers(model)
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    started = time.perf_counter()
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    items = batches(loader)
    if checkpointer is not None:
        items = checkpointer.until_stopped(items)
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
    if checkpointer is not None:
        checkpointer.after_evaluation()
    loss, first, five, count = world.sum(sums).tolist()
    result = {"eval_loss": loss / count, "top1": 100 * first / count}
    if model.num_classes >= 5:
        result["top5"] = 100 * five / count
    return result | {"eval_images": int(count)}
