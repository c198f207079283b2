"""What a reply earns: answers that are compared, patterns, lengths, tests, functions of yours, a reward model.

A reward is a number for one reply. Code that is not dougong's runs in a process of its own and may take `seconds`; what
raises, is no finite number or never returns is an error that names the reply, or, with `on_error="zero"`, counts 0 and
is counted.
"""

import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from dougong.adapt.sandbox import code_of, run_tests
from dougong.core.errors import ConfigError, DataError, did_you_mean

_NUMBER = re.compile(r"(?:(?<!\d)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+]?\d+)?")
_MINUS = "\u2212"    # the typographic sign
_START_S = 60.0      # a file of rewards may import much
_PLAIN = ("exact", "contains", "numeric", "tests")
_FORMS = (*_PLAIN, "regex:PATTERN", "length:TOKENS", "model:RUN", "FILE.py:FUNCTION")


@dataclass(frozen=True)
class Task:
    """What was asked, as messages, the answer that can be checked (for `tests`, the code of the tests), and the tools
    that may be called."""

    prompt: tuple[dict[str, Any], ...]
    answer: str = ""
    skill: str | None = None
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Reply:
    """What the model wrote: its text, and its tokens without the one that ended it."""

    task: Task
    text: str
    tokens: tuple[int, ...] = ()


class Reward(Protocol):
    """The value of each reply, in order; in place of one, why there is none."""

    def __call__(self, replies: Sequence[Reply]) -> list[float | str]: ...


class Rewards:
    """A reward with a decision about its failures. `failed` counts those that `on_error="zero"` has let pass."""

    def __init__(self, spec: str, *, on_error: Literal["error", "zero"] = "error", seconds: float = 5.0,
                 open_model: Callable[[str], Reward] | None = None) -> None:
        """`open_model` makes a reward of the run that `model:RUN` names. Raises ConfigError for an unknown form."""
        self.spec, self.on_error, self.failed = spec, on_error, 0
        self._reward = _build(spec, seconds, open_model)

    def __call__(self, replies: Sequence[Reply]) -> list[float]:
        """A finite number for each reply. Raises DataError for a failure under `on_error="error"`."""
        return [self._checked(value, reply) for value, reply in zip(self._reward(replies), replies, strict=True)]

    def _checked(self, value: float | str, reply: Reply) -> float:
        problem = value if isinstance(value, str) else None if math.isfinite(value) else f"gave {value}"
        if problem is None:
            return float(value)
        if self.on_error == "error":
            asked = reply.task.prompt[-1]["content"] if reply.task.prompt else ""
            raise DataError(f"the reward {self.spec} {problem}, for the reply {reply.text[:120]!r} to {asked[:120]!r}."
                            "\nMend it, or let such replies count 0: objective.on_error=zero.")
        self.failed += 1
        return 0.0


def exact(reply: Reply) -> float:
    """1 where the reply is the answer, but for white space around it."""
    return float(reply.text.strip() == reply.task.answer.strip())


def contains(reply: Reply) -> float:
    """1 where the answer occurs in the reply."""
    return float(reply.task.answer.strip() in reply.text)


def numeric(reply: Reply) -> float:
    """1 where the last number of the reply is the last number of the answer (to a millionth of it)."""
    said, wanted = (_last_number(text) for text in (reply.text, reply.task.answer))
    return float(said is not None and wanted is not None and math.isclose(said, wanted, rel_tol=1e-6, abs_tol=1e-9))


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.replace(_MINUS, "-"))      # after a digit it is no sign: 2020-2021
    return float(found[-1].replace(",", "")) if found else None


def _build(spec: str, seconds: float, open_model: Callable[[str], Reward] | None) -> Reward:
    name, colon, rest = spec.partition(":")
    if spec in ("exact", "contains", "numeric"):
        function = {"exact": exact, "contains": contains, "numeric": numeric}[spec]
        return lambda replies: [function(reply) for reply in replies]
    if spec == "tests":
        return lambda replies: [_tested(reply, seconds) for reply in replies]
    if name == "regex" and colon:
        try:
            re.compile(rest)
        except re.error as error:
            raise ConfigError(f"the pattern of objective.reward={spec} cannot be read: {error}.") from None
        return Worker(["--regex", rest], seconds, spec)
    if name == "length" and rest.isdigit() and int(rest):
        return lambda replies: [max(0.0, 1 - abs(len(reply.tokens) - int(rest)) / int(rest)) for reply in replies]
    if name == "model" and rest and open_model is not None:
        return open_model(rest)
    path, _, function_name = spec.rpartition(":")
    if path.endswith(".py"):
        if not Path(path).expanduser().is_file():
            raise ConfigError(f"objective.reward={spec}: there is no file {path}.")
        return Worker([str(Path(path).expanduser().absolute()), function_name], seconds, spec)
    raise ConfigError(f"unknown reward {spec!r}.{did_you_mean(name, _PLAIN)} Known forms: {', '.join(_FORMS)}.")


def _tested(reply: Reply, seconds: float) -> float:
    """1 where the code of the reply passes the task's tests; code that fails, crashes or hangs earns 0."""
    return float(run_tests(code_of(reply.text), reply.task.answer, seconds=seconds).passed)


class Worker:
    """A reward in another process (`reward_worker.py`), started when first asked and again after it was ended."""

    def __init__(self, arguments: list[str], seconds: float, spec: str) -> None:
        self._arguments, self._seconds, self._spec = arguments, seconds, spec
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def __call__(self, replies: Sequence[Reply]) -> list[float | str]:
        return [self._one(reply) for reply in replies]

    def _one(self, reply: Reply) -> float | str:
        process = self._running()
        assert process.stdin is not None
        asked = {"reply": reply.text, "task": asdict(reply.task)}
        try:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.close()
            return "ended its process"
        try:
            answer = self._answer(self._seconds)
        except TimeoutError:
            self.close()
            return f"did not return within {self._seconds:g} s"
        except EOFError:
            self.close()
            return "ended its process"
        return float(answer["value"]) if "value" in answer else f"raised {answer['error']}"

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        script = Path(__file__).with_name("reward_worker.py")
        self._process = subprocess.Popen([sys.executable, str(script), *self._arguments], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, start_new_session=True)
        self._read = b""
        try:
            problem = self._answer(_START_S).get("error")
        except TimeoutError as error:
            problem = f"its process {error}"
        except EOFError:
            problem = "its process ended while it started"
        if problem is not None:
            self.close()
            raise ConfigError(f"objective.reward={self._spec} cannot be used: {problem}.")
        return self._process

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next line of the process. Raises TimeoutError where none came in time, EOFError where none can come."""
        assert self._process is not None and self._process.stdout is not None
        handle, until = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._read:
            ready, _, _ = select.select([handle], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise TimeoutError(f"said nothing within {seconds:g} s")
            if not (piece := os.read(handle, 1 << 16)):
                raise EOFError   # a pipe closes a moment before the process can be waited for
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process and all that it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        self._process = None

    def __del__(self) -> None:
        self.close()
