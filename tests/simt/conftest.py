import pytest


@pytest.fixture(scope="session")
def host_cache(tmp_path_factory):
    """Where libraries built for the host are kept from one run of the tests to the next."""
    return tmp_path_factory.getbasetemp().parent / "simt"
