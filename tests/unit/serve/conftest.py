import pytest
from live_server import live

pytest.importorskip("fastapi")


@pytest.fixture(scope="session")
def shared():
    """One server for all tests that leave it as it was."""
    with live() as running:
        yield running


@pytest.fixture
def server(shared):
    yield shared
    shared.idle()
