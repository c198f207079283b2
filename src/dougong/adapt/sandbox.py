"""Running code that a model wrote, with tests, in a process that cannot do much.

What it holds: processor time, memory, size of files, number of open files, wall-clock time (then everything that was
started is killed), an empty environment (no variables, so no keys in them), a directory of its own that is removed, and
Python in isolated mode without site packages. On Linux where user namespaces are allowed: no network, and processes
that cannot outlive it or see others. New processes are refused to users other than root.

What it does not hold: the code may read whatever this user may read, and write where this user may write (files of at
most 1 MB). It may also look for a way to pass without solving the task. For code of an adversary take a virtual
machine.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

_CHILD = r"""
import json, os, resource, sys
verdict, payload = int(sys.argv[1]), json.loads(sys.stdin.read())
for name, value in payload["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
word, names = payload.pop("word"), {"__name__": "__main__"}
def tell(value):
    os.write(verdict, json.dumps(value).encode()[:2000])
try:
    for part in ("code", "tests"):
        exec(compile(payload[part], part, "exec"), names)
except BaseException as error:
    tell({"error": f"{type(error).__name__}: {error}"[:500]})
    os._exit(1)
tell({"word": word})
os._exit(0)
"""
_FILE_BYTES, _OPEN_FILES = 1 << 20, 32


@dataclass(frozen=True)
class Verdict:
    """Whether the tests ran to their end, and if not, why."""

    passed: bool
    reason: str = ""
    timed_out: bool = False


def run_tests(code: str, tests: str, *, seconds: float = 5.0, memory_bytes: int = 512 << 20) -> Verdict:
    """Runs `code`, then `tests` in the same names; passed means that neither raised or ended early."""
    word = secrets.token_hex(16)
    cpu = max(1, int(seconds + 0.999))
    limits = {"RLIMIT_CPU": cpu, "RLIMIT_AS": memory_bytes, "RLIMIT_FSIZE": _FILE_BYTES, "RLIMIT_NOFILE": _OPEN_FILES,
              "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    payload = json.dumps({"limits": limits, "word": word, "code": code, "tests": tests}).encode()
    reader, writer = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="dougong-sandbox-", ignore_cleanup_errors=True) as directory:
            child = subprocess.Popen(
                [*isolation(), sys.executable, "-I", "-S", "-c", _CHILD, str(writer)], cwd=directory,
                env={"PATH": os.defpath, "HOME": directory, "TMPDIR": directory, "LC_ALL": "C.UTF-8"},
                pass_fds=[writer], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True)
            try:
                with suppress(BrokenPipeError):
                    child.communicate(payload, timeout=seconds)
            except subprocess.TimeoutExpired:
                return Verdict(False, f"it did not end within {seconds:g} s", timed_out=True)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        os.set_blocking(reader, False)      # nobody else's hold on the pipe is waited for
        told = dict(json.loads(os.read(reader, 4096)))
    except (BlockingIOError, TypeError, ValueError):    # nothing was told, or nonsense
        told = {}
    finally:
        os.close(reader)
        os.close(writer)
    if told.get("word") == word:
        return Verdict(True)
    if child.returncode < 0 or child.returncode > 128:
        return Verdict(False, told.get("error", "it was ended: a limit of time or memory, or a crash"))
    return Verdict(False, told.get("error", "it ended before the tests had"))


@cache
def isolation() -> tuple[str, ...]:
    """The command that takes network and other processes away; empty where this system does not allow it."""
    command = ("unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
    try:
        tried = subprocess.run([*command, "true"], capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if tried.returncode == 0 else ()


def code_of(reply: str) -> str:
    """The code of a reply: what stands between the first pair of fences, or all of it."""
    _, fence, rest = reply.partition("```")
    if not fence:
        return reply
    _, _, body = rest.partition("\n")
    return body.partition("```")[0]
