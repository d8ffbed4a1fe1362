"""The samples of a training loader, single and in batches."""

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """A training image.

    Attributes:
        image: uint8 (C, H, W).
        label: class index.
        problem: why the image could not be read and was replaced; else empty.
        name: the image's index, or its place in a shard.
        seconds: the time for reading and augmenting it.
    """

    image: Tensor
    label: int
    problem: str
    name: int | str
    seconds: float


class SampleBatch(NamedTuple):
    """The fields of several samples, as PyTorch collates them."""

    image: Tensor
    label: Tensor
    problem: list[str]
    name: Tensor | list[str]
    seconds: Tensor
