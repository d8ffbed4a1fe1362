"""Weights carried over to other classes."""

import pytest
import torch
from safetensors.torch import load_file

from t2tvit.cli import main
from tests.support.training.tiny import metrics_of

SHARED = (
    *("--config", "digits", "--num-classes", "none", "--workers", "0", "--warmup-epochs", "0"),
    *("--model-args", "embed_dim=48", "depth=2", "num_heads=2", "--device", "cpu"),
)


def train(output, data: str, epochs: int, *options: str) -> None:
    command = ["train", *SHARED, "--data", data, "--epochs", str(epochs), "--output", str(output)]
    assert main([*command, *options]) == 0


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Weights that know the digits from 0 to 4."""
    folder = tmp_path_factory.mktemp("pretrained")
    train(folder, "digits:01234", 12)
    assert metrics_of(folder)[-1]["top1"] > 90
    return folder / "last.safetensors"


def test_other_digits_are_learned_faster_than_from_scratch(tmp_path, pretrained):
    """Equal steps at equal learning rates."""
    train(tmp_path / "scratch", "digits:56789", 2)
    train(tmp_path / "transfer", "digits:56789", 2, "--init", str(pretrained))
    scratch, transfer = (metrics_of(tmp_path / name)[-1] for name in ("scratch", "transfer"))
    assert transfer["top1"] > scratch["top1"] + 5
    assert transfer["eval_loss"] < scratch["eval_loss"]


def test_a_frozen_backbone_stays_as_it_was_under_a_new_head(tmp_path, pretrained):
    train(
        tmp_path, "digits:56789", 1, "--init", str(pretrained), "--backbone-lr-scale", "0",
        "--ema-decay", "0",
    )  # fmt: skip
    before, after = load_file(pretrained), load_file(tmp_path / "last.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert metrics_of(tmp_path)[-1]["top1"] > 30  # guessing has 20
