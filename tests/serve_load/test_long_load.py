"""The load test of `tests/unit/serve`, longer and with 64 clients; DOUGONG_LOAD_SECONDS=1800 makes it half an hour."""

import gc
import os
import resource

import pytest
from live_server import live, tiny_model
from test_load import load

from dougong.serve.settings import ServeConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4000)]


def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def test_64_clients():
    seconds = float(os.environ.get("DOUGONG_LOAD_SECONDS", 60))
    config = ServeConfig(port=0, rows=16, queue=32)
    with live(config, models=[tiny_model(config)]) as server:
        load(server, clients=64, seconds=seconds / 4)
        server.idle()
        gc.collect()
        before, kept = resident_mib(), server.scheduler.nbytes
        seen = load(server, clients=64, seconds=seconds)
        server.idle(30)
        gc.collect()
        assert set(seen) <= {200, 400, 429, "left"} and seen.count(200) > seconds
        assert server.scheduler.nbytes <= 2 * kept + 2**20
        assert resident_mib() - before < 60, f"{before:.0f} MiB before, {resident_mib():.0f} after {len(seen)} requests"
        assert server.client.get("/ready").status_code == 200
