"""Files that are either whole or absent: atomic writes, checksums, locks, and errors that name the disk."""

import contextlib
import errno
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dougong.core.errors import CheckpointError, DougongError

_CHUNK_BYTES = 1 << 20


def default_cache() -> Path:
    """$DOUGONG_CACHE, or ~/.cache/dougong: what can be made again."""
    return Path(os.environ.get("DOUGONG_CACHE") or "~/.cache/dougong").expanduser()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `path` whole or not at all: temporary file beside it, fsync, rename. Raises DougongError for a folder."""
    if path.is_dir():
        raise DougongError(f"{path} is a folder, and a file is to be written there. Name a file in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def sync_directory(path: Path) -> None:
    """Makes renames inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of the file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def lock(path: Path, *, owner: str, patience_s: float = 0.0) -> Iterator[None]:
    """Holds an exclusive lock file for as long as the block runs; the kernel frees it if the process dies.

    `patience_s`: how long to wait for it; a file server frees a lost machine's locks only after a while. Raises
    CheckpointError naming the process that holds it, DougongError where the file system knows no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 (the lock lives as long as the handle)
    try:
        try:
            _take(file, patience_s)
        except BlockingIOError:
            holder = _holder(file)
            raise CheckpointError(f"{path.parent} is in use by {holder}.\n"
                                  "Wait for it, stop it, or choose another --run name.") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise DougongError(f"the file system of {path.parent} knows no locks ({error.strerror}), and without them "
                               "two processes could write there at once.\nMount it with locks (Lustre: -o flock), or "
                               "use another disk: --run for runs, DOUGONG_CACHE for prepared data.") from None
        file.truncate(0)
        file.write(f"{owner}, process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        file.close()


def _take(file: IO[str], patience_s: float) -> None:
    import fcntl

    end = time.monotonic() + patience_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(min(1.0, patience_s))


def _holder(file: IO[str]) -> str:
    """Who holds a lock, by its own word, which it writes a moment after taking it."""
    for _ in range(20):
        file.seek(0)
        if name := file.read().strip():
            return name
        time.sleep(0.05)
    return "another process"


_NO_ROOM = {errno.ENOSPC: ("the disk is full", "Free some space or choose another directory"),
            errno.EDQUOT: ("the disk quota is used up", "Free some space or choose another directory"),
            errno.EROFS: ("the file system is read-only", "Choose a directory on another one")}
_DENIED = "permission was denied", "Try `ls -ld` on it and on the folders above it, or name another path"
_NO_WAY = {errno.EACCES: _DENIED, errno.EPERM: _DENIED,
           errno.ENOTDIR: ("a part of the path is a file, not a folder", "Name another path"),
           errno.ENAMETOOLONG: ("the name is too long", "Name a shorter path")}


@contextlib.contextmanager
def explained_disk_errors(what: str) -> Iterator[None]:
    """Turns a full or read-only disk inside the block into a DougongError that says what could not be written; and a
    path that may not be used, or cannot be one, into one that names it: whether it was read or written is not known."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            reason, advice = _NO_ROOM[error.errno]
            raise DougongError(f"cannot write {what}: {reason} ({error.filename or 'no file named'}).\n"
                               f"Nothing already written was lost. {advice}, then continue.") from error
        if error.errno in _NO_WAY:
            reason, advice = _NO_WAY[error.errno]
            raise DougongError(f"cannot read or write {error.filename or what}: {reason}.\n{advice}.") from error
        raise
