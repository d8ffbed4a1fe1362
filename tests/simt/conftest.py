import pytest

from t2t_kernels.backends import BACKENDS
from tests.support.devices import CUDA_ON_HOST


@pytest.fixture
def cuda_backend(cuda_on_host, monkeypatch):
    """Makes the backend "cuda" use the host build on CPU tensors, even if there is a GPU."""
    monkeypatch.setitem(BACKENDS, "cuda", CUDA_ON_HOST)
