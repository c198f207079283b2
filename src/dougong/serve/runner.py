"""The scheduler's thread: one per model. Tokens go to asyncio readers; a reader that leaves takes its work with it."""

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from dougong.core.errors import DougongError
from dougong.generate.engine import Token
from dougong.serve.errors import ApiError

_FAILURES = 3   # steps in a row that may break before the runner calls itself unwell


class Runner:
    """Runs a scheduler in one thread, which alone touches it; what others want of it waits in an inbox.

    What takes as long as a step waits apart (`call`), as one such function stands between two steps.
    """

    def __init__(self, scheduler: Any, *, rows: int, queue: int, on_step: Callable[[float, int], None] | None = None,
                 ) -> None:
        """`rows` texts are written at a time and `queue` more may wait; `on_step(seconds, tokens)` is told each."""
        self.scheduler, self.rows, self.queue = scheduler, rows, queue
        self.active = 0            # texts that clients wait for
        self.failures = 0
        self._on_step = on_step
        self._inbox: deque[Callable[[], None]] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._ended = False
        self._readers: dict[int, tuple[_Reader, int]] = {}   # of the scheduler's ids; the thread's own
        self._seconds = 1.0        # a text's typical duration, for Retry-After
        self._thread = threading.Thread(target=self._run, name="dougong-scheduler", daemon=True)

    def start(self) -> "Runner":
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    def close(self) -> None:
        """Ends the thread after its step; readers get no more."""
        self._ended = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and self.failures < _FAILURES

    def wait_seconds(self) -> float:
        """A guess at when a place will be free."""
        return max(1.0, self.active / self.rows * self._seconds)

    @contextmanager
    def places(self, count: int = 1) -> Iterator[None]:
        """Places among the texts that are written or wait. Raises ApiError 429 where there are not so many."""
        if self.active + count > self.rows + self.queue:
            wait = self.wait_seconds()
            raise ApiError(429, f"{self.active} texts are being written or wait, and {count} more do not fit "
                           f"({self.rows} at a time, {self.queue} in the queue). Try again in {wait:.0f} s.",
                           code="queue_full", retry_after=wait)
        self.active += count
        try:
            yield
        finally:
            self.active -= count

    async def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function in the scheduler's thread and returns what it returns. While texts are being written, there
        is a step between one such function and the next."""
        return await self._ask(function, self._calls)

    @asynccontextmanager
    async def read(self, requests: Sequence[Any]) -> AsyncIterator["_Reader"]:
        """The tokens of some requests as an async iterator of lists of (index, Token).

        Leaving the block for any reason cancels what has not ended. Raises ApiError 429 where too many wait, and
        what the scheduler raises for a request that can never run.
        """
        reader, begin = _Reader(self, len(requests)), time.monotonic()
        with self.places(len(requests)):
            try:
                await self._ask(lambda: self._add(reader, requests), self._inbox)
                yield reader
                self._seconds += 0.1 * (time.monotonic() - begin - self._seconds)
            finally:
                self._send(lambda: self._cancel(reader))   # behind the addition, whether that was awaited or not

    # ---- in the thread

    def _run(self) -> None:
        while not self._ended:
            turn = [self._inbox.popleft() for _ in range(len(self._inbox))]   # what comes meanwhile is for the next
            turn += [self._calls.popleft()] if self._calls else []
            for work in turn:
                try:
                    work()
                except Exception as error:   # ours; the thread serves everyone and must not end by it
                    traceback.print_exception(error)
            if self.scheduler.waiting + self.scheduler.running:
                self._step()
            elif not (self._inbox or self._calls):
                self._wake.wait()
                self._wake.clear()

    def _step(self) -> None:
        begin = time.perf_counter()
        try:
            tokens = self.scheduler.step()
            self.failures = 0
        except Exception as error:   # ours, or the machine's (memory): those who run are told, the server goes on
            self.failures += 1
            tokens = [_failed(id, error) for id in self._readers]
            for token in tokens:
                self.scheduler.cancel(token.row)
        told: dict[_Reader, list[tuple[int, Token]]] = {}
        for token in tokens:
            if (known := self._readers.get(token.row)) is not None:
                told.setdefault(known[0], []).append((known[1], token))
                if token.finish:
                    del self._readers[token.row]
        if told:
            self._post(lambda: [reader.give(some) for reader, some in told.items()])
        if self._on_step is not None:
            self._on_step(time.perf_counter() - begin, len(tokens))

    def _add(self, reader: "_Reader", requests: Sequence[Any]) -> None:
        try:
            for index, request in enumerate(requests):
                self._readers[self.scheduler.add(request)] = reader, index
        except BaseException:
            self._cancel(reader)
            raise

    def _cancel(self, reader: "_Reader", index: int | None = None) -> None:
        """Ends a reader's requests, or one of them."""
        for id in [id for id, (held, i) in self._readers.items() if held is reader and index in (None, i)]:
            del self._readers[id]
            self.scheduler.cancel(id)

    # ---- between the threads

    async def _ask(self, function: Callable[[], Any], box: deque[Callable[[], None]]) -> Any:
        future: asyncio.Future = self._loop.create_future()

        def run() -> None:
            if future.cancelled():   # who asked has left
                return
            try:
                outcome, error = function(), None
            except Exception as raised:
                outcome, error = None, raised
            self._post(lambda: _settle(future, outcome, error))

        box.append(run)
        self._wake.set()
        return await future

    def _send(self, work: Callable[[], None]) -> None:
        self._inbox.append(work)
        self._wake.set()

    def _post(self, work: Callable[[], Any]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work)


class _Reader:
    """The tokens of one client's requests, a list for each step; ends when every request has."""

    def __init__(self, runner: Runner, requests: int) -> None:
        self._runner = runner
        self._open = set(range(requests))
        self._steps: asyncio.Queue[list[tuple[int, Token]]] = asyncio.Queue()

    def give(self, tokens: list[tuple[int, Token]]) -> None:
        self._steps.put_nowait(tokens)

    def stop(self, index: int) -> None:
        """Ends one of the requests; its tokens that are on their way are not given."""
        self._open.discard(index)
        self._runner._send(lambda: self._runner._cancel(self, index))

    def __aiter__(self) -> "_Reader":
        return self

    async def __anext__(self) -> list[tuple[int, Token]]:
        while self._open:
            tokens = [(index, token) for index, token in await self._steps.get() if index in self._open]
            self._open -= {index for index, token in tokens if token.finish is not None}
            if tokens:
                return tokens
        raise StopAsyncIteration


def _settle(future: asyncio.Future, outcome: Any, error: Exception | None) -> None:
    if not future.done():
        if error is None:
            future.set_result(outcome)
        else:
            future.set_exception(error)


def _failed(id: int, error: Exception) -> Any:
    said = str(error) if isinstance(error, DougongError) else f"{type(error).__name__} in the engine"
    return Token(id, -1, "error", error=said)   # type: ignore[call-arg]
