"""Rows and steps of whole models, with synthetic images and no loader."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import nn

from bench.kernel_rows import DEVICE
from t2tvit.models import create_model
from t2tvit.speed import inference_step, training_step
from t2tvit.training.config import RunConfig

MODELS = ("t2t_vit_7", "t2t_vit_14", "t2t_vit_t_14", "t2t_vit_19", "t2t_vit_24")
RIVALS = ("vit_small_patch16_224", "deit_small_patch16_224", "resnet50")
AMP = {"fp32": "none", "bf16": "bfloat16"}
PASSES = {"training": training_step, "inference": inference_step}
CLASSES = 1000
SIZE = 224


@dataclass(frozen=True)
class ModelRow:
    """``backend`` is "reference" or "fused", or "eager" for a rival, optionally with "-compile"."""

    model: str
    batch: int
    dtype: str
    direction: str
    backend: str

    @property
    def name(self) -> str:
        return f"{self.model}-{SIZE}-B{self.batch}-{self.dtype}-{self.direction}-{self.backend}"

    @property
    def plain(self) -> str:
        """The backend to compare this row with."""
        return "eager" if self.model in RIVALS else "reference"


def rows(batch: int | None, compiled: bool, smoke: bool) -> list[ModelRow]:
    """Every model, its passes and backends; for a smoke run, one model and one rival."""
    batch = batch or {"cpu": 4, "cuda": 128}[DEVICE.type]
    found = []
    for model in (MODELS[0], RIVALS[-1]) if smoke else MODELS + RIVALS:
        backends = ("eager",) if model in RIVALS else ("reference", "fused")
        if compiled:
            backends += tuple(f"{backend}-compile" for backend in backends)
        for dtype in AMP:
            for direction in PASSES:
                found += [ModelRow(model, batch, dtype, direction, name) for name in backends]
    return found


def build(row: ModelRow) -> nn.Module:
    torch.manual_seed(0)
    kind = row.backend.removesuffix("-compile")
    if row.model in RIVALS:
        model = timm.create_model(row.model, num_classes=CLASSES)
        if row.model == "resnet50":
            # The fastest memory format for convolutions.
            model = model.to(memory_format=torch.channels_last)
    else:
        fused = "auto" if kind == "fused" else kind
        model = create_model(row.model, fused_kernels=fused, num_classes=CLASSES)
    model = model.to(DEVICE)
    if row.backend.endswith("-compile"):
        torch.compiler.reset()
        model.compile(dynamic=False)
    return model


def batch_of(row: ModelRow) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    images = torch.randn(row.batch, 3, SIZE, SIZE, device=DEVICE)
    if row.model == "resnet50":
        images = images.to(memory_format=torch.channels_last)
    return images, torch.randint(CLASSES, (row.batch,), device=DEVICE)


def config(row: ModelRow) -> RunConfig:
    return RunConfig(amp=AMP[row.dtype])


def step(row: ModelRow) -> Callable[[], object]:
    """One update, or the classification of one batch."""
    return PASSES[row.direction](build(row), *batch_of(row), config(row))
