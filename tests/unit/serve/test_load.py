"""Clients that leave, flood, send rubbish or read nothing: their work stops, other answers are right, nothing leaks."""

import asyncio
import json
import os
import random
import socket
import statistics
import threading
import time
from pathlib import Path

import httpx
import live_server
import pytest
from live_server import bind, live, tiny_model

from dougong.generate.engine import Token
from dougong.serve.settings import ServeConfig

MINUTES = float(os.environ.get("LOAD_MINUTES", "5"))
LONG = {"prompt": "a", "max_tokens": 240, "seed": 1}


def counts_as_left(server, expected):
    """The count follows the end of the work by a moment."""
    end = time.monotonic() + 2
    while server.app.state.metrics.left._value.get() != expected and time.monotonic() < end:
        time.sleep(0.005)
    return server.app.state.metrics.left._value.get() == expected


@pytest.mark.parametrize("stream", [True, False])
def test_the_engine_stops_when_the_client_leaves(server, monkeypatch, stream):
    server.slow(monkeypatch, 0.02)   # 240 tokens would take five seconds
    connection = server.raw({**LONG, "stream": stream})
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    while not server.scheduler.running:
        time.sleep(0.005)
    left = server.app.state.metrics.left._value.get()
    begin = time.monotonic()
    connection.close()
    server.idle(2)
    assert time.monotonic() - begin < 1.5
    assert counts_as_left(server, left + 1)


def test_a_client_that_leaves_within_its_body_is_counted_and_no_mistake_of_the_servers(server, capfd):
    left = server.app.state.metrics.left._value.get()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: 100\r\n\r\n{")
    connection.close()
    assert counts_as_left(server, left + 1)
    assert "Traceback" not in capfd.readouterr().err


def test_a_client_that_leaves_the_queue_is_forgotten(monkeypatch):
    config = ServeConfig(port=0, rows=1, queue=4)
    with live(config, models=[tiny_model(config)]) as server:
        server.slow(monkeypatch, 0.02)
        first, second = server.raw(LONG), server.raw(LONG)
        while (server.scheduler.running, server.scheduler.waiting) != (1, 1):
            time.sleep(0.005)
        second.close()
        while server.scheduler.waiting:
            time.sleep(0.005)
        assert server.scheduler.running == 1
        first.close()
        server.idle()


def test_a_full_queue_is_answered_429_and_when_to_come_back(monkeypatch):
    config = ServeConfig(port=0, rows=1, queue=2)
    with live(config, models=[tiny_model(config)]) as server:
        server.slow(monkeypatch, 0.02)
        held = [server.raw(LONG) for _ in range(3)]
        while server.runner.active < 3:
            time.sleep(0.005)
        refused = server.post("/v1/completions", LONG)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert server.post("/v1/completions", {**LONG, "stream": True}).status_code == 429   # before any event
        for connection in held:
            connection.close()
        server.idle()
        assert server.post("/v1/completions", {**LONG, "max_tokens": 2}).status_code == 200


def test_a_client_that_reads_nothing_is_given_up(monkeypatch):
    def small(config):   # else the kernel alone takes the whole megabyte
        listener = bind(config)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(live_server, "bind", small)
    config = ServeConfig(port=0, send_seconds=0.4)
    with live(config, models=[tiny_model(config)]) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        body = json.dumps({**LONG, "n": 16, "stream": True, "logprobs": 20}).encode()   # a megabyte
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)
        while not server.runner.active:
            time.sleep(0.005)
        server.idle(20)
        assert counts_as_left(server, 1)
        connection.close()


def test_a_reply_ends_when_its_time_is_over(monkeypatch):
    config = ServeConfig(port=0, request_seconds=0.4)
    with live(config, models=[tiny_model(config)]) as server:
        server.slow(monkeypatch, 0.02)
        reply = server.post("/v1/completions", LONG).json()
        assert reply["choices"][0]["finish_reason"] == "length" and reply["timings"]["ended_by"] == "time limit"
        assert 2 < reply["usage"]["completion_tokens"] < 40
        server.slow(monkeypatch, 1.0)
        assert server.post("/v1/completions", LONG).status_code == 408
        server.idle()


def test_a_step_that_breaks_is_told_to_those_who_run_and_the_server_goes_on(server, monkeypatch):
    step, broken = server.scheduler.step, [2]

    def breaks():
        if broken[0] > 0:
            broken[0] -= 1
            raise MemoryError("no room")
        return step()

    monkeypatch.setattr(server.scheduler, "step", breaks)
    answer = server.post("/v1/completions", LONG)
    assert answer.status_code == 500 and "MemoryError" in answer.json()["error"]["message"]
    events = server.post("/v1/completions", {**LONG, "stream": True}).text
    assert "MemoryError" in events
    assert server.post("/v1/completions", LONG).status_code == 200
    broken[0] = 3
    for _ in range(3):
        server.post("/v1/completions", LONG)
    assert server.client.get("/ready").status_code == 503   # three in a row: somebody should look
    assert server.post("/v1/completions", LONG).status_code == 200
    assert server.client.get("/ready").status_code == 200


def test_a_failing_request_costs_the_others_nothing(server, monkeypatch):
    """The contract of the scheduler: a token that is an error belongs to one request alone."""
    step = server.scheduler.step
    whole = server.post("/v1/completions", LONG).json()["choices"][0]["text"]
    ids = []

    def fails_one():
        tokens = step()
        if not ids and len({token.row for token in tokens}) == 2:
            ids.append(max(token.row for token in tokens))
            server.scheduler.cancel(ids[0])
            return [Token(t.row, -1, "error", error="NaN logits") if t.row == ids[0] else t for t in tokens]
        return tokens

    monkeypatch.setattr(server.scheduler, "step", fails_one)
    answers = {}

    def ask(name, body):
        answers[name] = server.client.post("/v1/completions", json=body, timeout=30)

    threads = [threading.Thread(target=ask, args=(i, LONG)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers.values()) == [200, 500]
    good = next(answer for answer in answers.values() if answer.status_code == 200)
    assert good.json()["choices"][0]["text"] == whole


def test_draining_refuses_new_work_and_ends_what_runs(monkeypatch):
    config = ServeConfig(port=0)
    with live(config, models=[tiny_model(config)]) as server:
        server.slow(monkeypatch, 0.005)
        running = server.raw({**LONG, "stream": True})
        assert running.recv(20).startswith(b"HTTP/1.1 200")
        server.app.state.draining = True
        assert server.client.get("/ready").json()["status"] == "draining"
        assert server.client.get("/health").status_code == 200
        refused = server.post("/v1/completions", LONG)
        assert refused.status_code == 503 and "retry-after" in refused.headers
        server.client.close()
        server.server.should_exit = True   # what SIGTERM sets
        text = b""
        while part := running.recv(65536):
            text += part
        assert b"data: [DONE]" in text


GARBAGE = [b"", b"{", b"[[[[", b'{"prompt": 5}', b'{"prompt": "a", "max_tokens": -1}', b"\xff" * 300, b"null",
           b'{"prompt": "' + b"a" * 3000 + b'"}', b'{"prompt": "a", "tools": [1]}']


async def one_client(url, number, deadline, expected, seen):
    """Asks again and again: properly, then leaving, then rubbish; notes every status and every wrong text."""
    rng = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:   # all share one interpreter
        while time.monotonic() < deadline:
            kind = rng.random()
            seed = rng.randrange(len(expected))
            body = {"prompt": f"text {seed}", "max_tokens": 24, "seed": seed}
            if kind < 0.4:
                response = await client.post("/v1/completions", json=body)
                seen.append(response.status_code)
                if response.status_code == 200 and response.json()["choices"][0]["text"] != expected[seed]:
                    seen.append("wrong text")
            elif kind < 0.6:
                response = await client.post("/v1/completions", content=rng.choice(GARBAGE),
                                             headers={"content-type": "application/json"})
                seen.append(response.status_code)
            elif kind < 0.8:   # leaves in the middle of a stream
                async with client.stream("POST", "/v1/completions", json={**body, "max_tokens": 200, "stream": True,
                                                                          }) as response:
                    seen.append(response.status_code)
                    async for _ in response.aiter_bytes():
                        if rng.random() < 0.3:
                            break
            else:              # leaves before the answer
                try:
                    await client.post("/v1/completions", json={**body, "max_tokens": 200},
                                      timeout=rng.uniform(0.001, 0.1))
                except httpx.TimeoutException:
                    seen.append("left")


def load(server, clients, seconds):
    expected = [server.post("/v1/completions", {"prompt": f"text {seed}", "max_tokens": 24, "seed": seed}
                            ).json()["choices"][0]["text"] for seed in range(12)]
    seen = []

    async def run():
        deadline = time.monotonic() + seconds
        await asyncio.gather(*(one_client(server.url, i, deadline, expected, seen) for i in range(clients)))

    asyncio.run(run())
    return seen


def test_sixteen_clients_that_leave_and_send_rubbish():
    config = ServeConfig(port=0, rows=8, queue=16)
    with live(config, models=[tiny_model(config)]) as server:
        seen = load(server, clients=16, seconds=4)
        server.idle()
        assert set(seen) <= {200, 400, 429, "left"} and seen.count(200) > 10 and seen.count(400) > 5
        assert server.client.get("/ready").status_code == 200


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory as Linux tells it")
def test_sixty_four_clients_for_minutes():
    """`LOAD_MINUTES=30` for half an hour: no 5xx, every text right, no block held, memory flat after a third."""
    sizes, config = [], ServeConfig(port=0, rows=16, queue=64)
    with live(config, models=[tiny_model(config)]) as server:
        ended = threading.Event()

        def watch():
            while not ended.wait(1.0):
                sizes.append(resident_bytes())

        threading.Thread(target=watch, daemon=True).start()
        seen = load(server, clients=64, seconds=60 * MINUTES)
        ended.set()
        server.idle(60)
        assert set(seen) <= {200, 400, 413, 429, "left"} and {200, 400} <= set(seen)
        early, late = (sizes[len(sizes) * part // 10:len(sizes) * (part + 2) // 10] for part in (3, 8))
        growth = statistics.median(late) - statistics.median(early)
        print(f"{len(seen):,} requests: { {str(kind): seen.count(kind) for kind in set(seen)} }; memory "
              f"{statistics.median(early) / 1e6:.0f} MB, later {growth / 1e6:+.1f} MB")
        assert growth < 0.03 * statistics.median(early)
        assert server.client.get("/ready").status_code == 200
