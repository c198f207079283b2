"""A real server in a thread: a tiny random model, a free port, every socket real."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import torch

from dougong.core.config import from_dict
from dougong.data.tokenizer import BytesConfig
from dougong.generate import Engine
from dougong.models import FAMILIES
from dougong.runtime.device import Runtime
from dougong.serve.app import create_app
from dougong.serve.model import ServedModel
from dougong.serve.server import Server, bind
from dougong.serve.settings import ServeConfig

CONTEXT = 256


def tiny_net(seed=1, vocab_size=257, context=CONTEXT):
    model = from_dict(FAMILIES["nano"], {"vocab_size": vocab_size, "context": context, "dim": 32, "num_layers": 2,
                                         "num_heads": 2, "ffn_dim": 64}).build()
    model.initialise(seed)
    with torch.no_grad():   # an untrained model is as good as uniform; a text should depend on what it follows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def tiny_engine(seed=1, vocab_size=257, context=CONTEXT):
    return Engine(tiny_net(seed, vocab_size, context), Runtime())


def tiny_model(config, name="tiny", template=None, seed=1):
    return ServedModel(name, tiny_engine(seed), BytesConfig().build(), config, template=template,
                       facts={"parameters": 1}, fingerprint="tiny")


class Live:
    """A running server. `slow(seconds)` makes each step of the engine take at least that long."""

    def __init__(self, app, server, port):
        self.app, self.server, self.port = app, server, port
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=30)

    @property
    def runner(self):
        return self.app.state.models["tiny"].runner

    @property
    def scheduler(self):
        return self.runner.scheduler

    def post(self, path, body, **more):
        return self.client.post(path, json=body, **more)

    def slow(self, monkeypatch, seconds):
        step = self.scheduler.step

        def slower():
            time.sleep(seconds)
            return step()

        monkeypatch.setattr(self.scheduler, "step", slower)

    def idle(self, seconds=10.0):
        """Waits until nothing runs or waits anywhere; says what is left where that does not come."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            left = (self.scheduler.waiting, self.scheduler.running, self.runner.active, len(self.runner._readers))
            if left == (0, 0, 0, 0) and self.scheduler.free_blocks == self.scheduler.blocks:
                return True
            time.sleep(0.01)
        raise AssertionError(f"(waiting, running, active, readers) = {left}, "
                             f"{self.scheduler.blocks - self.scheduler.free_blocks} blocks held")

    def raw(self, body, path="/v1/completions", headers=""):
        """A socket that has sent a request by hand."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
                           f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection


@contextmanager
def live(config=None, keys=None, models=None):
    config = config or ServeConfig(port=0)
    app = create_app(models or [tiny_model(config)], config, keys)
    listener = bind(config)
    server = Server(app, config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end
        time.sleep(0.005)
    running = Live(app, server, listener.getsockname()[1])
    try:
        yield running
    finally:
        running.client.close()
        server.should_exit = True
        thread.join(timeout=config.drain_seconds + 20)     # a client that hangs is waited for so long
        listener.close()
        assert not thread.is_alive()
