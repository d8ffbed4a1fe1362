"""Where the kernels run in the tests: on the GPU if there is one, else in a replacement.

Without a GPU the Triton kernels run in Triton's interpreter and the CUDA source in a host build
(``tests/simt``), both on CPU tensors and behind the same public functions.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # A process per core, with a thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from t2t_kernels import backends
from tests.support.cuda.build import ROOT, build_host_library
from tests.support.devices import CUDA_ON_HOST, DEVICE

INTERPRETED, ON_HOST, STAND_IN = "", "", ()
if DEVICE.type == "cpu":
    INTERPRETED, ON_HOST, STAND_IN = "-interpreted", "-on-host", (pytest.mark.slow,)


def kernel_backends() -> list:
    """The compiled backends that can be tested on this machine, as pytest parameters."""
    return [
        pytest.param("cpu", id="cpu"),
        pytest.param("triton", id=f"triton{INTERPRETED}", marks=STAND_IN),
        pytest.param("cuda", id=f"cuda{ON_HOST}", marks=STAND_IN),
    ]


def pytest_collection_modifyitems(items):
    """Skips what needs a GPU where there is none, and begins with the files that take longest.

    Then the last ones are short, and no process waits long for another's.
    """
    for item in items:
        if item.get_closest_marker("gpu") and DEVICE.type != "cuda":
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def host_cache():
    """Where libraries built for the host are kept from one run of the tests to the next."""
    return ROOT / "build" / "tests"


@pytest.fixture(scope="session")
def cuda_on_host(host_cache):
    """The CUDA source, built for the host and registered for CPU tensors."""
    torch.ops.load_library(build_host_library(host_cache))


@pytest.fixture(params=kernel_backends())
def backend(request, monkeypatch):
    """The name of a compiled backend that supports tensors on ``device`` on this machine."""
    name = request.param
    if name == "triton" and DEVICE.type == "cpu" and backends.why_unavailable("triton"):
        pytest.skip(f"Triton: {backends.why_unavailable('triton')}")
    if name == "cuda" and DEVICE.type == "cpu":
        request.getfixturevalue("cuda_on_host")
        monkeypatch.setitem(backends.BACKENDS, "cuda", CUDA_ON_HOST)
    return name


@pytest.fixture
def skip_unless_taken(backend):
    """Skips a case whose dtype or sizes the kernel of ``backend`` for an operation does not take."""

    def check(operation: str, dtype: torch.dtype, **sizes: int) -> None:
        reason = backends.OPERATIONS[operation].why_not(backend, dtype, sizes)
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")

    return check


@pytest.fixture
def device(backend):
    return torch.device("cpu") if backend == "cpu" else DEVICE


@pytest.fixture(autouse=True)
def fresh_compiler(request):
    """Reset the compiler: tests compile the same functions more often than its limit."""
    yield
    if "compile" in request.node.name or "opcheck" in request.node.name:
        torch._dynamo.reset()


@pytest.fixture
def poisoned():
    """New memory holds NaN, so that an element that was not written cannot look valid."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
