"""API keys: made here, kept as salted hashes, each with limits of its own.

A key is 32 random bytes, so nobody guesses it from its hash and one round of SHA-256 is enough; a slow hash protects
passwords that people choose, and would let a flood of wrong keys keep a core busy.
"""

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from pydantic import Field

from dougong.core.config import config, from_dict, to_dict
from dougong.core.errors import ConfigError
from dougong.serve.errors import ApiError

_PREFIX = "dg-"
_MINUTE = 60.0


@config
class KeyConfig:
    """One key as the file holds it: never the key itself."""

    name: str = Field(min_length=1, max_length=64)
    salt: str
    sha256: str
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """tokens read and written; one reply may pass it, the next then waits until the debt is paid"""
    concurrent: int | None = Field(default=None, ge=1)
    """requests answered at the same time"""


class Bucket:
    """A token bucket: holds a minute's worth, fills steadily, may go into debt."""

    def __init__(self, per_minute: float) -> None:
        self._capacity, self._level, self._filled = max(per_minute, 1.0), max(per_minute, 1.0), time.monotonic()
        self._rate = per_minute / _MINUTE

    def wait(self, need: float) -> float:
        """Seconds until `need` is there; 0 where it is."""
        self._fill()
        return max(0.0, (min(need, self._capacity) - self._level) / self._rate)

    def take(self, amount: float) -> None:
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = time.monotonic()
        self._level = min(self._capacity, self._level + (now - self._filled) * self._rate)
        self._filled = now


@dataclass
class Client:
    """Who asks: a key's name and what it has used. On this machine's own address without keys: one nameless client."""

    name: str
    concurrent: int | None = None
    requests: Bucket | None = None
    tokens: Bucket | None = None
    running: int = field(default=0)

    def check(self) -> None:
        """Raises ApiError 429 with the seconds to wait where a limit is reached; counts nothing."""
        if self.concurrent is not None and self.running >= self.concurrent:
            raise ApiError(429, f"this key may have {self.concurrent} requests at the same time. Wait for one to end.",
                           code="concurrent_requests", retry_after=1)
        for bucket, need, what in ((self.requests, 1.0, "requests"), (self.tokens, 1.0, "tokens")):
            if bucket is not None and (seconds := bucket.wait(need)) > 0:
                raise ApiError(429, f"this key has used its {what} per minute. Try again in {seconds:.0f} s.",
                               code="rate_limit_exceeded", retry_after=seconds)

    def enter(self) -> None:
        """Counts one request. Raises ApiError 429 with the seconds to wait where a limit is reached."""
        self.check()
        if self.requests is not None:
            self.requests.take(1)
        self.running += 1

    def leave(self, tokens: int) -> None:
        """The request has ended, having read and written this many tokens."""
        self.running -= 1
        if self.tokens is not None:
            self.tokens.take(tokens)


class Keys:
    """The keys of a file."""

    def __init__(self, entries: list[KeyConfig]) -> None:
        self._entries = [(bytes.fromhex(entry.salt), bytes.fromhex(entry.sha256), _client(entry)) for entry in entries]

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: str) -> Client | None:
        """The client of a key. Every entry is compared, each in constant time."""
        found = None
        for salt, digest, client in self._entries:
            if hmac.compare_digest(_hash(salt, key), digest):
                found = client
        return found

    def of_header(self, header: str) -> Client | None:
        """The client of an Authorization header: `Bearer KEY`, or `Basic` with the key as password (browsers)."""
        scheme, _, value = header.partition(" ")
        if scheme.lower() == "bearer":
            return self.find(value.strip())
        if scheme.lower() == "basic":
            try:
                return self.find(base64.b64decode(value.strip(), validate=True).decode().partition(":")[2])
            except (binascii.Error, UnicodeDecodeError):
                return None
        return None

    @classmethod
    def load(cls, path: Path) -> "Keys":
        """Raises ConfigError saying what is wrong with the file."""
        entries = _read(path)
        if not entries:
            raise ConfigError(f"{path} holds no key. Make one: dougong serve --new-key NAME "
                              f"--api-key-file {quote(str(path))}")
        return cls(entries)


def add_key(path: Path, name: str, **limits: float | int | None) -> str:
    """Adds a new key to a file (made with mode 600) and returns it: the only time it is ever seen."""
    entries = _read(path) if path.exists() else []
    if any(entry.name == name for entry in entries):
        raise ConfigError(f"{path} has a key {name!r} already. Choose another name, or remove that entry first.")
    key, salt = _PREFIX + secrets.token_urlsafe(32), secrets.token_bytes(16)
    entries.append(from_dict(KeyConfig, {"name": name, "salt": salt.hex(), "sha256": _hash(salt, key).hex(),
                                         **{k: v for k, v in limits.items() if v is not None}}))
    text = json.dumps({"keys": [to_dict(entry) for entry in entries]}, indent=1) + "\n"
    half = path.with_name(path.name + ".new")
    with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(half, path)
    return key


def _read(path: Path) -> list[KeyConfig]:
    try:
        held = json.loads(path.read_text("utf-8"))
        entries = [from_dict(KeyConfig, entry) for entry in held["keys"]]
        for entry in entries:
            if len(bytes.fromhex(entry.sha256)) != 32 or not bytes.fromhex(entry.salt):
                raise ConfigError(f"the key {entry.name!r} has no whole hash or no salt")
    except FileNotFoundError:
        raise ConfigError(f"there is no key file {path}. "
                          f"Make one: dougong serve --new-key NAME --api-key-file {quote(str(path))}") from None
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"{path} is no file of API keys: {error}.\nMake one: dougong serve --new-key NAME "
                          f"--api-key-file NEW_FILE") from None
    return entries


def _client(entry: KeyConfig) -> Client:
    return Client(entry.name, entry.concurrent,
                  None if entry.requests_per_minute is None else Bucket(entry.requests_per_minute),
                  None if entry.tokens_per_minute is None else Bucket(entry.tokens_per_minute))


def _hash(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode("utf-8", "surrogatepass")).digest()
