"""Answers to clients that may leave: their work is stopped, whether they hang up or take nothing."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` returns. Raises ClientLeft, having cancelled it, when the client hangs up first."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_hang_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: each item of `events` as one `data:` line of JSON, and `[DONE]`."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict, None], source: AsyncGenerator, send_seconds: float,
                 left: Callable[[], object]) -> None:
        """`source` is the work behind `events`; it is closed too, as they may never have been begun."""
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._source, self._seconds, self._left = events, source, send_seconds, left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_left(receive, self._write(send))
        except (ClientLeft, TimeoutError, OSError):
            self._left()
        finally:
            await self._events.aclose()   # the work stops now, not when the collector finds it
            await self._source.aclose()

    async def _write(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await self._send(send, _body(b"data: " + _json(event) + b"\n\n"))
        await self._send(send, _body(b"data: [DONE]\n\n"))
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: dict) -> None:
        async with asyncio.timeout(self._seconds):
            await send(message)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(text: bytes) -> dict:
    return {"type": "http.response.body", "body": text, "more_body": True}


def _json(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
