"""The runtime of the host build: it must report the faults that it checks for."""

import ctypes
import re

import pytest
import torch

from tests.support.cuda.build import SIMT, build_host_library

pytestmark = pytest.mark.slow

# In the order of planted.cu.
FAULTS = ["none", "no-barrier", "exit", "other-barrier", "overrun", "misaligned", "shared"]
FAULTS += ["no-wait", "no-lane", "copy-misaligned"]
FAULTS += ["not-shown", "not-fenced", "not-committed", "not-awaited"]
FAULTS += ["no-warp", "other-matrix", "off-pattern", "overwritten"]
FAULTS += ["not-arrived", "not-waited", "other-count"]


@pytest.fixture(scope="module")
def run_planted(host_cache):
    """Runs planted.cu; returns whether all elements are right, and the runtime's message."""
    library = ctypes.CDLL(build_host_library(host_cache, [SIMT / "planted.cu"]))
    library.run.restype = ctypes.c_char_p

    def run(fault: str, blocks: int = 3, threads: int = 48) -> tuple[bool, str]:
        values = torch.arange(1.0, blocks * threads + 1)
        expected = -values.view(blocks, threads).flip(1).flatten()
        address = ctypes.c_void_p(values.data_ptr())
        message = library.run(address, blocks, threads, FAULTS.index(fault)).decode()
        return torch.equal(values, expected), message

    return run


def test_runs_a_correct_kernel(run_planted):
    assert run_planted("none") == (True, "no error")


def test_dropped_barrier_gives_wrong_results(run_planted):
    assert run_planted("no-barrier") == (False, "no error")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("exit", r"threads exited while others wait at the barrier in line \d+"),
        ("other-barrier", r"threads wait at different barriers, in lines \d+ and \d+"),
        ("overrun", r"shared memory was written at byte 192 of 192"),
        ("misaligned", r"misaligned access at .*planted\.cu:\d+"),
        ("shared", r"invalid configuration argument"),
    ],
)
def test_fault_is_reported(run_planted, fault, expected):
    _, message = run_planted(fault)
    assert re.search(expected, message), message
    assert run_planted("none") == (True, "no error"), "the next launch has to be as new"


def test_too_many_threads_are_refused(run_planted):
    assert run_planted("none", threads=1025)[1] == "invalid configuration argument"


@pytest.fixture(scope="module")
def run_warp(host_cache):
    """Runs the warp of planted.cu; returns whether all elements are right, and the message."""
    library = ctypes.CDLL(build_host_library(host_cache, [SIMT / "planted.cu"]))
    library.run_warp.restype = ctypes.c_char_p

    def run(fault: str) -> tuple[bool, str]:
        values = torch.arange(128.0)
        expected = values.view(16, 2, 4).flip(1).flatten()
        address = ctypes.c_void_p(values.data_ptr())
        message = library.run_warp(address, FAULTS.index(fault)).decode()
        return torch.equal(values, expected), message

    return run


def test_runs_a_correct_warp(run_warp):
    assert run_warp("none") == (True, "no error")


def test_copies_arrive_at_their_wait(run_warp):
    assert run_warp("no-wait") == (False, "no error")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("no-lane", "lanes wait for others of their warp"),
        ("copy-misaligned", "an instruction of 16 bytes at an address that is not aligned"),
    ],
)
def test_fault_of_a_warp_is_reported(run_warp, fault, expected):
    _, message = run_warp(fault)
    assert expected in message
    assert run_warp("none") == (True, "no error"), "the next launch has to be as new"


@pytest.fixture(scope="module")
def run_group(host_cache):
    """Runs the warpgroup of planted.cu; returns results, expected results and the message."""
    library = ctypes.CDLL(build_host_library(host_cache, [SIMT / "planted.cu"]))
    library.run_group.restype = ctypes.c_char_p

    def run(fault: str) -> tuple[torch.Tensor, torch.Tensor, str]:
        values = torch.arange(64.0 * 64).remainder(251).view(64, 64)
        expected = values[:16].repeat(4, 1)
        address = ctypes.c_void_p(values.data_ptr())
        message = library.run_group(address, FAULTS.index(fault)).decode()
        return values, expected, message

    return run


def test_runs_a_correct_warpgroup(run_group):
    values, expected, message = run_group("none")
    assert torch.equal(values, expected) and message == "no error"


@pytest.mark.parametrize("fault", ["not-committed", "not-awaited"])
def test_products_arrive_at_their_wait(run_group, fault):
    values, _, message = run_group(fault)
    assert values.isnan().all() and message == "no error"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("not-shown", "shared memory that was not shown to it"),
        ("overwritten", "or that has changed meanwhile"),
        ("not-fenced", "registers are not fenced"),
        ("no-warp", "lanes wait for others of their warp or warpgroup"),
        ("other-matrix", "warps of a group multiply by different matrices"),
        ("off-pattern", "does not begin where its swizzle's pattern does"),
    ],
)
def test_fault_of_a_warpgroup_is_reported(run_group, fault, expected):
    assert expected in run_group(fault)[-1]
    assert run_group("none")[-1] == "no error", "the next launch has to be as new"


@pytest.fixture(scope="module")
def run_two_warps(host_cache):
    """Runs the two warps of planted.cu that share a numbered barrier."""
    library = ctypes.CDLL(build_host_library(host_cache, [SIMT / "planted.cu"]))
    library.run_two_warps.restype = ctypes.c_char_p

    def run(fault: str) -> tuple[bool, str]:
        values = torch.arange(32.0)
        expected = -values
        address = ctypes.c_void_p(values.data_ptr())
        message = library.run_two_warps(address, FAULTS.index(fault)).decode()
        return torch.equal(values, expected), message

    return run


@pytest.mark.parametrize("_", range(8))  # the order of the warps is random
def test_a_numbered_barrier_lets_warps_pass_once_all_have_come(run_two_warps, _):
    assert run_two_warps("none") == (True, "no error")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("not-arrived", "threads wait at barrier 3, where others do not arrive"),
        ("not-waited", "threads arrived at barrier 3, where others do not wait"),
        ("other-count", "threads expect different numbers of others at a barrier"),
    ],
)
def test_fault_at_a_numbered_barrier_is_reported(run_two_warps, fault, expected):
    assert expected in run_two_warps(fault)[-1]
    assert run_two_warps("none") == (True, "no error"), "the next launch has to be as new"
