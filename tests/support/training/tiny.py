"""A run that takes a second: a tiny model on synthetic images, with all random parts enabled."""

import json
from pathlib import Path

from t2tvit.training.checkpointing.states import read_state

TINY = (
    *("--data", "synthetic:44", "--img-size", "24", "--num-classes", "6", "--workers", "0"),
    *("--model", "t2t_vit_7", "--model-args", "embed_dim=32", "depth=2", "num_heads=2"),
    *("--batch-size", "8", "--lr", "1e-3", "--warmup-epochs", "1", "--cooldown-epochs", "0"),
    *("--ema-decay", "0.99", "--drop-path", "0.2", "--random-erasing", "0.5", "--mixup", "0.4"),
    *("--cutmix", "1.0", "--auto-augment", "rand-m5-mstd0.5-inc1", "--amp", "none"),
    *("--device", "cpu", "--fused-kernels", "reference"),
)
HELD_OUT = 11  # a quarter of the images; odd, so that two processes cannot share it evenly


def metrics_of(output: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def state_of(output: Path) -> dict:
    """The last training state of a run."""
    return read_state(newest(output))


def newest(output: Path) -> Path:
    """The file of the last training state."""
    return max(output.glob("state-*.safetensors"))
