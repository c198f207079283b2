"""The scheduler's thread: those who write go on, whatever else is asked of it."""

import asyncio
import threading
import time

from live_server import live

from dougong.serve.runner import Runner
from dougong.serve.settings import ServeConfig


class Writing:
    """A scheduler that always writes, and notes its steps."""

    waiting, running = 0, 1

    def __init__(self):
        self.events = []

    def step(self):
        self.events.append("step")
        return []


def test_those_who_write_wait_for_one_text_at_most():
    scheduler, all_asked = Writing(), threading.Event()

    async def run():
        runner = Runner(scheduler, rows=1, queue=0).start()
        texts = [runner.call(lambda: scheduler.events.append("text")) for _ in range(9)]

        async def open():
            all_asked.set()

        await asyncio.gather(runner.call(all_asked.wait), *texts, open())
        runner.close()

    asyncio.run(run())
    events = "".join(event[0] for event in scheduler.events)
    assert events.count("t") == 9 and "tt" not in events


def test_who_leaves_before_a_text_is_read_costs_nothing():
    scheduler, go_on = Writing(), threading.Event()

    async def run():
        runner = Runner(scheduler, rows=1, queue=0).start()
        first = asyncio.create_task(runner.call(go_on.wait))
        left = asyncio.create_task(runner.call(lambda: scheduler.events.append("text")))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await first
        await runner.call(lambda: None)
        runner.close()

    asyncio.run(run())
    assert "text" not in scheduler.events


def test_embeddings_wait_in_the_queue_and_are_refused_while_draining(monkeypatch):
    with live(ServeConfig(port=0, rows=1, queue=0)) as server:
        step, go_on = server.scheduler.step, threading.Event()
        monkeypatch.setattr(server.scheduler, "step", lambda: (go_on.wait(), step())[1])
        held = server.raw({"prompt": "a", "max_tokens": 2})
        while not server.runner.active:
            time.sleep(0.005)
        refused = server.post("/v1/embeddings", {"input": "a"})
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        go_on.set()
        assert held.recv(20).startswith(b"HTTP/1.1 200")
        server.idle()
        assert server.post("/v1/embeddings", {"input": ["a", "b"]}).status_code == 200
        server.idle()
        server.app.state.draining = True
        for path in ("embeddings", "tokenize"):
            refused = server.post(f"/v1/{path}", {"input": "a"})
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
