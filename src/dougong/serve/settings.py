"""What a server allows: one frozen section, every limit with its unit and its reason."""

from pydantic import Field

from dougong.core.config import config
from dougong.core.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@config
class ServeConfig:
    """Where a server listens and how much one client may ask of it."""

    host: str = "127.0.0.1"
    """the address; any but this machine's own needs API keys"""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one"""
    allow_origins: tuple[str, ...] = ()
    """origins (https://example.org) whose pages may call this server from a browser; none by default"""
    hostnames: tuple[str, ...] = ()
    """further names under which clients may address this server (the Host header)"""
    body_bytes: int = Field(default=1 << 20, ge=1024)
    """largest request body"""
    header_seconds: float = Field(default=15.0, gt=0)
    """a connection that has not sent a whole request head by then is closed"""
    body_seconds: float = Field(default=15.0, gt=0)
    """a client that has not sent its body by then is answered 408"""
    send_seconds: float = Field(default=30.0, gt=0)
    """a client that takes no byte for this long is given up, and its work stops"""
    request_seconds: float = Field(default=600.0, gt=0)
    """a reply ends with what it has by then"""
    max_tokens: int = Field(default=4096, ge=1)
    """most new tokens of one choice; a chat that names no number gets this many at most"""
    prompt_tokens: int | None = Field(default=None, ge=1)
    """longest prompt; None: the model's context"""
    choices: int = Field(default=16, ge=1)
    """most texts written for one request: prompts times n"""
    rows: int = Field(default=16, ge=1)
    """texts written at the same time; more wait"""
    queue: int = Field(default=64, ge=0)
    """texts that may wait for a row; beyond them a request is answered 429"""
    cache_tokens: int | None = Field(default=None, ge=1)
    """tokens whose keys and values are kept; None: every row's whole context, as far as free memory holds it"""
    speculate: int | None = Field(default=None, ge=0, le=64)
    """tokens guessed ahead, by the draft model, else by what repeats; None: 4 with a draft model, else 0"""
    connections: int = Field(default=1024, ge=1)
    """open connections; one more is answered 503"""
    drain_seconds: float = Field(default=30.0, ge=0)
    """after SIGTERM, how long running replies may take to end"""
    log_prompts: bool = False
    """write prompts and replies to standard error; off, no text of a client is ever logged"""

    def __post_init__(self) -> None:
        for origin in self.allow_origins:
            if origin == "*" or not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ConfigError(f"allow_origins holds {origin!r}, which is no origin. Name each one, such as "
                                  "https://example.org (scheme and host, no path); `*` would let every page in.")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK
