import pytest

from t2t_kernels import backends


@pytest.fixture(scope="session")
def host_cache(tmp_path_factory):
    """Where libraries built for the host are kept from one run of the tests to the next."""
    return tmp_path_factory.getbasetemp().parent / "simt"


@pytest.fixture
def cuda_backend(cuda_on_host, monkeypatch):
    """Lets the backend "cuda" take CPU tensors: the host build, even where there is a GPU."""
    monkeypatch.setitem(backends._LOAD_ERRORS, "cuda", None)
    monkeypatch.setitem(backends.DEVICE_TYPES, "cuda", {"cpu"})
