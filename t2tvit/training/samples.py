"""The samples of a training loader, single or in batches."""

from typing import NamedTuple

from torch import Tensor


class Sample(NamedTuple):
    """A training image, or a batch: then each field holds the values of all its images.

    Attributes:
        image: uint8 (C, H, W).
        label: class index.
        problem: why the image could not be read and was replaced; else empty.
        name: the image's index, or its place in a shard.
        seconds: the time for reading and augmenting it.
    """

    image: Tensor
    label: int | Tensor
    problem: str | list[str]
    name: int | str | Tensor | list[str]
    seconds: float | Tensor
