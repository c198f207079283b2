"""uvicorn around the app: slow heads are cut off, SIGTERM drains, and what is printed holds no text of a client."""

import asyncio
import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dougong.core.errors import ConfigError
from dougong.serve.settings import ServeConfig


class Server(uvicorn.Server):
    """A server that goes on answering /ready (503) and what runs while it drains."""

    def __init__(self, app: Any, config: ServeConfig) -> None:
        class Protocol(_ImpatientProtocol):
            seconds = config.header_seconds

        super().__init__(uvicorn.Config(
            app, host=config.host, port=config.port, http=Protocol, ws="none", lifespan="on", log_level="warning",
            access_log=False, server_header=False, proxy_headers=False, limit_concurrency=config.connections,
            timeout_keep_alive=30, timeout_graceful_shutdown=max(1, round(config.drain_seconds)),
            h11_max_incomplete_event_size=64 << 10))
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.draining = True
        super().handle_exit(sig, frame)


class _ImpatientProtocol(H11Protocol):
    """Closes a connection whose request head does not come whole in time (uvicorn itself waits for ever)."""

    seconds = 15.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.seconds, self._give_up)

    def data_received(self, data: bytes) -> None:
        if self._timer is None and self.cycle is not None and self.cycle.response_complete:
            self._timer = self.loop.call_later(self.seconds, self._give_up)   # the next head of a kept connection
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._calm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def _calm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def bind(config: ServeConfig) -> socket.socket:
    """The listening socket. Raises ConfigError where the address cannot be had."""
    try:
        infos = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror or error}.\n"
                          "Another program may use the port; --port 0 takes a free one.") from None
    return listener
