"""Compares two runs."""

import torch


def assert_equal(first, second, place="state"):
    """Whether tensors are bit-identical and everything else is equal."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_equal(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{place}.{index}")
    else:
        assert first == second, place


def without_times(history):
    times = ("seconds", "images_per_second", "loader_images_per_second", "loader_wait")
    times += ("memory_mib",)
    return [{key: row[key] for key in row if key not in times} for row in history]
