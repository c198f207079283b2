"""Token shards: a split as one long stream of token ids on disk, memory-mapped, tokenised once.

```
DIRECTORY/00000.tokens          little-endian uint16, or uint32 where the vocabulary is larger
          00000.documents.npy   (documents, 3) int64: tokens, UTF-8 bytes of text, source
          00000.json            sizes and checksums of the two; written last, so a shard without it is redone
          starts.npy bytes.npy source.npy      the index over all shards, memory-mapped too
          manifest.json         written last of all
```
Every document is the tokenizer's `first_id` (where it marks documents at all) followed by its tokens; what ends it is
not written, as it stands behind every document (pack.py). Where a shard ends depends on the documents alone, so work
that was interrupted goes on behind the last finished shard and gives the same files.
"""

import bisect
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dougong.core.errors import DataError
from dougong.core.files import explained_disk_errors, sha256, sync_directory, write_json
from dougong.data.materialise import Progress
from dougong.data.tokenizer import Tokenizer

SHARD_BYTES = 64 << 20                          # of text; one document is never cut in two shards
_BATCH_BYTES = 4 << 20                          # of text tokenised at once, which bounds memory
_LARGEST_UINT16_VOCABULARY = 1 << 16


@dataclass(frozen=True)
class TokenDocument:
    """One document's tokens, its first one included, with what bits per byte needs to know."""

    tokens: np.ndarray
    bytes: int
    source: str


class TokenStore:
    """Reads the shards of one split. Positions count tokens from the start of the first shard."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.dtype = np.dtype(manifest["dtype"])
        self.sources: list[str] = manifest["sources"]
        self.document_id: int | None = manifest["document_id"]
        self.first_id: int | None = manifest.get("first_id", self.document_id)
        self.starts, self.bytes_of, self.source_of = (
            np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("starts", "bytes", "source"))
        self._borders = [0]
        self._shards = []
        for shard in manifest["shards"]:
            self._borders.append(self._borders[-1] + shard["tokens"])
            path = directory / shard["file"]
            mapped = np.memmap(path, self.dtype, "r") if shard["size"] else np.empty(0, self.dtype)
            self._shards.append(mapped)      # (an empty file cannot be mapped)

    @classmethod
    def open(cls, directory: Path | str) -> "TokenStore":
        """Raises DataError when shards are unfinished, missing or of another size than the manifest says."""
        directory = Path(directory)
        try:
            manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            raise DataError(f"no finished token shards in {directory}. Prepare the data again.") from None
        for shard in manifest["shards"]:
            path = directory / shard["file"]
            size = path.stat().st_size if path.exists() else 0
            if size != shard["size"]:
                raise DataError(f"{path} has {size:,} bytes instead of {shard['size']:,}.\n"
                                f"Delete {directory} and prepare the data again.")
        return cls(directory, manifest)

    @property
    def tokens(self) -> int:
        return self._borders[-1]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.source_of)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop-1 of the stream, in the shards' own type."""
        shard = bisect.bisect_right(self._borders, start) - 1
        if stop <= start:
            return np.empty(0, self.dtype)
        if stop <= self._borders[shard + 1]:
            offset = self._borders[shard]
            return np.asarray(self._shards[shard][start - offset:stop - offset])
        middle = self._borders[shard + 1]
        return np.concatenate([self.read(start, middle), self.read(middle, stop)])

    def documents(self) -> Iterator[TokenDocument]:
        """Every document in order, each token exactly once: what evaluation walks over."""
        for index in range(len(self)):
            yield TokenDocument(self.read(int(self.starts[index]), int(self.starts[index + 1])),
                                int(self.bytes_of[index]), self.sources[self.source_of[index]])

    def per_source(self) -> dict[str, dict[str, int]]:
        """Documents, bytes of text and tokens of each source."""
        lengths, count = np.diff(self.starts), len(self.sources)
        columns = {"documents": np.ones(len(self), np.int64), "bytes": self.bytes_of, "tokens": lengths}
        sums = {name: _sums_by(self.source_of, column, count) for name, column in columns.items()}
        return {
            source: {name: int(sums[name][i]) for name in columns} for i, source in enumerate(self.sources)
        }


def _sums_by(group: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Sum of int64 `values` by `group`, exactly (bincount's weights would round)."""
    sums = np.zeros(count, np.int64)
    np.add.at(sums, group, values)
    return sums


def write_shards(documents: Any, tokenizer: Tokenizer, directory: Path, *, stage: str = "tokenise",
                 progress: Progress | None = None, shard_bytes: int = SHARD_BYTES) -> TokenStore:
    """Tokenises a DocumentView into `directory` and opens the result; finished shards are kept.

    `directory` belongs to one pair of documents and tokenizer: name it by their fingerprints.
    Uses every core (the encoders' threads) and holds a few MB of text, or one document where that is larger.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with explained_disk_errors(f"token shards in {directory}"):
        if not (directory / "manifest.json").exists():
            shards = list(_finished(directory))
            done, first = sum(s["bytes"] for s in shards), sum(s["documents"] for s in shards)
            while first < len(documents):
                shard = _write_shard(
                    documents,
                    first,
                    tokenizer,
                    directory,
                    len(shards),
                    shard_bytes,
                    lambda n, before=done: progress and progress(before + n, documents.bytes, stage),
                )
                shards.append(shard)
                first, done = first + shard["documents"], done + shard["bytes"]
            _finish(directory, shards, tokenizer)
    return TokenStore.open(directory)


def _finished(directory: Path) -> Iterator[dict[str, Any]]:
    """Descriptions of the unbroken run of whole shards from the first on."""
    for number in range(1 << 30):
        try:
            shard = json.loads((directory / f"{number:05d}.json").read_text("utf-8"))
            whole = all(sha256(directory / shard[part]) == shard[digest]
                        for part, digest in (("file", "sha256"), ("index", "index_sha256")))
        except (FileNotFoundError, ValueError, KeyError):
            return
        if not whole:
            return
        yield shard


def _write_shard(
    documents: Any,
    first: int,
    tokenizer: Tokenizer,
    directory: Path,
    number: int,
    shard_bytes: int,
    report: Callable[[int], Any],
) -> dict[str, Any]:
    """One shard, from document `first` until `shard_bytes` of text are in it; returns its description."""
    name, size, tokens = f"{number:05d}", 0, 0
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= _LARGEST_UINT16_VOCABULARY else "<u4")
    rows: list[tuple[int, int, int]] = []
    sources: dict[str, int] = {}
    digest = hashlib.sha256()
    first_id = _first_id(tokenizer)
    partial = directory / f".{name}.partial"
    with open(partial, "wb") as file:
        for batch in _batches(documents, first, min(_BATCH_BYTES, shard_bytes), shard_bytes):
            encoded = tokenizer.encode_batch([text for _, text, _ in batch])
            block = _joined(encoded, first_id, dtype)
            rows += [
                (
                    len(ids) + (first_id is not None),
                    length,
                    sources.setdefault(source, len(sources)),
                )
                for ids, (source, _, length) in zip(encoded, batch)
            ]
            file.write(block.data)
            digest.update(block.data)
            size, tokens = size + sum(length for *_, length in batch), tokens + len(block)
            report(size)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, directory / f"{name}.tokens")
    np.save(directory / f"{name}.documents.npy", np.asarray(rows, dtype=np.int64))
    description = {"file": f"{name}.tokens", "size": tokens * dtype.itemsize, "tokens": tokens,
                   "sha256": digest.hexdigest(), "index": f"{name}.documents.npy",
                   "index_sha256": sha256(directory / f"{name}.documents.npy"), "dtype": dtype.str,
                   "documents": len(rows), "bytes": size, "sources": list(sources)}
    write_json(directory / f"{name}.json", description)
    return description


def _batches(
    documents: Any, first: int, batch_bytes: int, shard_bytes: int
) -> Iterator[list[tuple[str, str, int]]]:
    """(source, text, UTF-8 bytes) of the documents of one shard, about `batch_bytes` of text at a time."""
    batch, batch_size, shard_size = [], 0, 0
    for index in range(first, len(documents)):
        document = documents[index]
        length = len(document.text.encode())
        batch.append((document.source, document.text, length))
        batch_size, shard_size = batch_size + length, shard_size + length
        if batch_size >= batch_bytes or shard_size >= shard_bytes:
            yield batch
            batch, batch_size = [], 0
        if shard_size >= shard_bytes:
            return
    if batch:
        yield batch


def _first_id(tokenizer: Tokenizer) -> int | None:
    """None for a stream without borders."""
    return None if tokenizer.document_id is None else tokenizer.first_id


def _joined(encoded: list[np.ndarray], first_id: int | None, dtype: np.dtype) -> np.ndarray:
    if first_id is not None:
        begin = np.array([first_id], dtype=np.int32)
        encoded = [part for ids in encoded for part in (begin, ids)]
    return np.concatenate(encoded).astype(dtype)


def _finish(directory: Path, shards: list[dict[str, Any]], tokenizer: Tokenizer) -> None:
    """Writes the index over all shards, one shard in memory at a time, then the manifest."""
    count = sum(shard["documents"] for shard in shards)
    sources = list(dict.fromkeys(name for shard in shards for name in shard["sources"]))
    shapes = {"starts": ("<i8", count + 1), "bytes": ("<i8", count), "source": ("<i4", count)}
    columns = {
        name: np.lib.format.open_memmap(
            directory / f".{name}.npy", mode="w+", dtype=np.dtype(kind), shape=(size,)
        )
        for name, (kind, size) in shapes.items()
    }
    at = position = 0
    columns["starts"][0] = 0
    for shard in shards:
        lengths, sizes, source = np.load(directory / shard["index"]).reshape(-1, 3).T
        stop = at + shard["documents"]
        columns["starts"][at + 1:stop + 1] = position + np.cumsum(lengths)
        columns["bytes"][at:stop] = sizes
        columns["source"][at:stop] = np.array([sources.index(name) for name in shard["sources"]])[source]
        at, position = stop, position + shard["tokens"]
    for name, column in columns.items():
        column.flush()
        os.replace(directory / f".{name}.npy", directory / f"{name}.npy")
    sync_directory(directory)
    dtype = shards[0]["dtype"] if shards else "<u2"
    write_json(
        directory / "manifest.json",
        {"dtype": dtype, "sources": sources, "document_id": tokenizer.document_id, "first_id": _first_id(tokenizer),
         "shards": shards},
    )
    with contextlib.suppress(FileNotFoundError):
        os.unlink(directory / f".{len(shards):05d}.partial")
