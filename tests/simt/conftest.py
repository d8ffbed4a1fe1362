import pytest

from t2t_kernels.backends import BACKENDS
from tests.support.devices import CUDA_ON_HOST


@pytest.fixture(scope="session")
def host_cache(tmp_path_factory):
    """Where libraries built for the host are kept from one run of the tests to the next."""
    return tmp_path_factory.getbasetemp().parent / "simt"


@pytest.fixture
def cuda_backend(cuda_on_host, monkeypatch):
    """Lets the backend "cuda" take CPU tensors: the host build, even where there is a GPU."""
    monkeypatch.setitem(BACKENDS, "cuda", CUDA_ON_HOST)
