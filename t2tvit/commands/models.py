"""``t2tvit models``: architecture, cost, published accuracy and kernels of each model."""

import argparse
import fnmatch
from dataclasses import dataclass

import torch
from torch import nn

from t2t_kernels.backends import OPERATIONS, why_not_here
from t2tvit.errors import InputError, unknown_name
from t2tvit.models import BASELINES, MODELS, T2TBackbone, create_model, list_models
from t2tvit.models.cost import multiply_adds
from t2tvit.models.timm_models import TIMM, create_timm_model

HELP = "list models with their cost and published accuracy"
EPILOG = """
examples:
  t2tvit models
  t2tvit models 't2t_vit_t_*' timm:resnet50 --img-size 384
"""
# The operation of each kind of T2T layer; convolutions use PyTorch.
LAYER_OPERATIONS = {"performer": "performer_layer", "transformer": "transformer_layer"}
HEAD = (
    *("model", "tokens", "dim/depth/heads", "parameters", "GMACs"),
    *("paper's", "top-1", "at 384", "fused kernels"),
)
LEFT = ("model", "tokens", "dim/depth/heads", "fused kernels")


@dataclass(frozen=True)
class Surveyed:
    """A row of the table. Figures of the paper are missing for timm's models."""

    name: str
    parameters: int
    multiply_adds: int
    tokens: str = "–"
    shape: str = "–"
    published_gmacs: float | None = None
    top1: float | None = None
    top1_384: float | None = None
    kernels: tuple[str, ...] = ()

    def cells(self) -> tuple[str, ...]:
        published = (self.published_gmacs, self.top1, self.top1_384)
        return (
            *(self.name, self.tokens, self.shape),
            *(f"{self.parameters:,}", f"{self.multiply_adds / 1e9:.2f}"),
            *(f"{value}" if value is not None else "–" for value in published),
            " ".join(self.kernels) or "–",
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="names of our models, wildcards allowed, or timm:NAME (default: all of ours)",
    )
    parser.add_argument(
        "--img-size",
        type=int,
        default=224,
        metavar="N",
        help="image size for counting multiply-adds (default: 224)",
    )


def run(arguments: argparse.Namespace) -> None:
    """List the models that the parsed arguments name.

    Raises:
        InputError: A name is unknown, or a model does not support the image size.
    """
    size = arguments.img_size
    if size < 16:
        raise InputError(f"--img-size: got {size}, expected at least 16")
    rows = [survey(name, size) for name in chosen(arguments.names)]
    cells = [HEAD, *(row.cells() for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEAD))]
    for row in cells:
        aligned = (
            f"{cell:<{width}}" if title in LEFT else f"{cell:>{width}}"
            for title, cell, width in zip(HEAD, row, widths)
        )
        print("  ".join(aligned).rstrip())
    print(
        f"parameters and GMACs: counted here, at {size} × {size}. The paper's GMACs and ImageNet top-1 "
        "(%): at 224 × 224 unless said otherwise"
    )
    for backend in ("cpu", "triton", "cuda"):
        reason = why_not_here(backend)
        print(f"kernels, {backend}: {f'not available: {reason}' if reason else 'available'}")


def chosen(patterns: list[str]) -> list[str]:
    """The models that match ``patterns`` (wildcards or ``timm:NAME``); all of ours if there are none."""
    names = []
    for pattern in patterns or ["*"]:
        known = list_models(baselines=True)
        matching = fnmatch.filter(known, pattern)
        if not matching and not pattern.startswith(TIMM):
            raise InputError(f"{unknown_name('model', pattern, known)}; timm's are timm:NAME")
        names += matching or [pattern]
    return list(dict.fromkeys(names))


def survey(name: str, size: int) -> Surveyed:
    """Count the parameters and multiply-adds of a model, which is built without allocating memory."""
    if name.startswith(TIMM):
        with torch.device("meta"):
            model = create_timm_model(name, img_size=size)
        try:
            return Surveyed(name, parameters(model), multiply_adds(model, (size, size)))
        except (AssertionError, RuntimeError) as error:
            raise InputError(f"{name} at {size} × {size}: {error}") from None
    with torch.device("meta"):
        model = create_model(name, img_size=size)
    published = (MODELS | BASELINES)[name]
    options = published.options
    tokens = options.get("tokens_type", "performer")
    return Surveyed(
        name,
        parameters(model),
        multiply_adds(model, (size, size)),
        tokens,
        shape_of(model),
        published.gmacs,
        published.top1,
        published.top1_384,
        tuple(OPERATIONS[LAYER_OPERATIONS[tokens]].kernels) if tokens in LAYER_OPERATIONS else (),
    )


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shape_of(model: T2TBackbone) -> str:
    """Width, depth and heads of the backbone; the width of a dense one grows with depth."""
    blocks = [block for block in model.blocks if hasattr(block, "attn")]
    width = f"{model.embed_dim}"
    if model.num_features != model.embed_dim:
        width += f"–{model.num_features}"
    return f"{width}/{len(blocks)}/{blocks[0].attn.num_heads}"
