"""What a training loader delivers, one at a time or in batches."""

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """A training image; of a batch, each field holds all of its images'.

    Attributes:
        image: uint8 (C, H, W).
        label: class index.
        problem: why the image could not be read and another replaces it; else empty.
        name: the image's index, or its place in a shard.
        seconds: what reading and augmenting it took.
    """

    image: Tensor
    label: int | Tensor
    problem: str | list[str]
    name: int | str | Tensor | list[str]
    seconds: float | Tensor
