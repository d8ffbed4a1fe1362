import pytest

from t2t_kernels.backends import BACKENDS
from tests.support.devices import CUDA_ON_HOST


@pytest.fixture(scope="session")
def host_cache(tmp_path_factory):
    """The cache of libraries built for the host."""
    return tmp_path_factory.getbasetemp().parent / "simt"


@pytest.fixture
def cuda_backend(cuda_on_host, monkeypatch):
    """Makes the backend "cuda" use the host build on CPU tensors, even if there is a GPU."""
    monkeypatch.setitem(BACKENDS, "cuda", CUDA_ON_HOST)
