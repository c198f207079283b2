"""Bytes to text: compressed files, byte-order marks, coding lines, and the byte where a file is no text."""

import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from dougong.core.errors import ConfigError, MissingExtraError

PIECE_BYTES = 16 << 20   # a larger file becomes several documents of about this size, so memory stays bounded
COMPRESSED = (".gz", ".xz", ".zst")
_ZSTD_BYTES = 1 << 13    # a frame of one repeated byte unfolds four bytes to 128 KiB
# 32 before 16: its mark begins with 16's
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CODING_LINE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")         # PEP 263
_BLANK_OR_COMMENT = re.compile(rb"^[ \t\f]*(?:#|\r?$)")


class NotText(Exception):
    """A file that cannot be read as text: the reason (a few words, to count by) and where it shows."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(f"{reason} ({where})" if where else reason)
        self.reason, self.where = reason, where


def bare_suffix(name: str) -> str:
    """The suffix that says what a file holds, in lower case: `.jsonl` for `a.JSONL.gz`."""
    lower = name.lower()
    return Path(next((lower.removesuffix(c) for c in COMPRESSED if lower.endswith(c)), lower)).suffix


def check_encoding(encoding: str) -> str:
    """Returns the name of a text encoding Python knows; raises ConfigError for any other."""
    if not _is_text_encoding(encoding):
        raise ConfigError(f"encoding={encoding!r} is not a text encoding. "
                          "Try utf-8, gb18030, big5, shift_jis, euc_kr, cp1252, latin-1 or utf-16.")
    return encoding


def _is_text_encoding(name: str) -> bool:
    try:
        return codecs.lookup(name)._is_text_encoding   # which rot13, hex and the like are not
    except (LookupError, ValueError):
        return False


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file, decompressing .gz, .xz and .zst. Raises MissingExtraError for .zst without zstandard."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if name.endswith(".xz"):
        return cast(BinaryIO, lzma.open(path, "rb"))
    if name.endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise MissingExtraError("zstandard", "data", f"reading {path.name}") from None
        return io.BufferedReader(_Frames(open(path, "rb"), zstandard.ZstdDecompressor()), 1 << 20)
    return open(path, "rb")


class _Frames(io.RawIOBase):
    """The frames of a .zst file as one stream. zstandard's own reader takes a frame that breaks off for the end of the
    file; this one raises EOFError, as gzip's and lzma's do."""

    def __init__(self, file: BinaryIO, decompressor: Any) -> None:
        self._file, self._decompressor = file, decompressor
        self._frame, self._rest, self._ready = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._file.read(_ZSTD_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready, self._rest = memoryview(self._frame.decompress(data)), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def damage() -> tuple[type[Exception], ...]:
    """What reading a truncated or corrupted compressed file can raise."""
    errors: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, lzma.LZMAError, zlib.error)
    try:
        import zstandard
    except ImportError:
        return errors
    return (*errors, zstandard.ZstdError)


def encoding_of(head: bytes, *, python: bool = False, encoding: str | None = None) -> str:
    """The encoding of a file that begins with `head`: its byte-order mark, else (for `.py` files) its PEP 263
    coding line, else `encoding`, else UTF-8. Raises NotText where the coding line names no known encoding."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if python:
        for line in head.split(b"\n", 2)[:2]:
            if match := _CODING_LINE.match(line):
                name = match[1].decode("ascii", "replace")
                if not _is_text_encoding(name):
                    raise NotText("unknown encoding in its coding line", repr(name))
                return name
            if not _BLANK_OR_COMMENT.match(line):
                break   # the second line counts only after a blank or a comment
    return encoding or "utf-8"


def read_text(path: Path, *, encoding: str | None = None) -> Iterator[str]:
    """Yields the text of a file: whole up to 16 MiB, else in pieces of about that size that end with a line.

    Newlines stay as they are. Raises NotText at the first byte that is NUL (outside UTF-16 and UTF-32) or
    does not decode; the pieces before it have been yielded. Raises OSError where the file cannot be read.
    """
    with open_bytes(path) as file:
        try:
            yield from _decoded(file, python=bare_suffix(path.name) == ".py", encoding=encoding)
        except damage() as error:
            raise NotText("damaged compressed file", str(error)) from None


def _decoded(file: BinaryIO, *, python: bool, encoding: str | None) -> Iterator[str]:
    chunk = file.read(PIECE_BYTES)
    name = encoding_of(chunk[:1000], python=python, encoding=encoding)
    decoder = codecs.getincrementaldecoder(name)()
    wide = codecs.lookup(name).name.startswith(("utf-16", "utf-32"))
    end, rest = 0, ""
    while chunk:
        if not wide and (nul := chunk.find(0)) >= 0:
            raise NotText("binary", f"NUL at byte {end + nul}")
        end += len(chunk)
        following = file.read(PIECE_BYTES)
        try:
            text = rest + decoder.decode(chunk, final=not following)
        except UnicodeDecodeError as error:   # error.object ends where this chunk ends, wherever it begins
            at = end - len(error.object) + error.start
            raise NotText(f"not {name.removesuffix('-sig')}", f"byte {at}") from None
        cut = (text.rfind("\n") + 1 or len(text)) if following else len(text)
        yield text[:cut]
        chunk, rest = following, text[cut:]
