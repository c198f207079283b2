"""What a teacher says of every place of a text, inferred once and kept on disk.

```
ROOT/KEY/ids.bin log_p.bin   the k likeliest next tokens after each token of the training split (uint16 or uint32),
                             their log-probabilities and that of all others (float16)
     next_bytes.bin          or the log-probabilities of the next byte (float16, 257), where both tokenizers have a
                             border
     progress.json           blocks done, so that work that was interrupted goes on
     manifest.json           written last: without it the rest is unfinished
```
KEY is made of the teacher's weights and tokenizer, the data, the window, the temperature, k and the precision.

Places count tokens from the beginning of the split. So every packing and every epoch, whose windows lie elsewhere,
finds its answers; and the teacher does not read the student's windows but each document by itself, in windows of its
own that overlap by half: at least half a window stands before every token, where the document has that much. Of
documents that fit a window whole the answers are those of a teacher at hand. Where the student's row begins in the
middle of a document the teacher has read more than the student; so had the author whose next word is the ordinary
target, and what forward KL asks of the student is the same in both cases: the mean over all that may have stood before.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dougong.core.errors import DataError
from dougong.core.files import explained_disk_errors, write_json
from dougong.data.prepare import turn
from dougong.data.tokenizer import Tokenizer
from dougong.objectives.divergence import byte_probabilities, top_of
from dougong.runtime.device import Runtime

_SPLIT = "train"
_BLOCKS_AT_ONCE = 256       # blocks between two notes of progress
_BATCH_TOKENS = 8192
_TRIED_TOKENS = 16_384
_LOGITS_AT_ONCE = 1 << 22
_BYTES = 257                # 256 bytes, and the end of the text
_LEAST_LOG_P = -6e4         # float16 goes to -65,504


@dataclass(frozen=True)
class CachePlan:
    """Which answers, of which text, where. `columns` are the files: name -> (type, numbers of each token)."""

    directory: Path
    corpus: Any
    tokenizer: Tokenizer
    """the teacher's"""
    context: int
    temperature: float
    top_k: int | None
    """None: the next byte"""
    columns: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.corpus.tokens(_SPLIT).tokens

    @property
    def bytes(self) -> int:
        """What it will take on disk."""
        return self.tokens * sum(np.dtype(kind).itemsize * width for kind, width in self.columns.values())

    @property
    def is_written(self) -> bool:
        return (self.directory / "manifest.json").is_file()


def plan_answers(corpus: Any, *, context: int, tokenizer: Tokenizer, fingerprint: str, temperature: float,
                 top_k: int | None, precision: str, root: Path) -> CachePlan:
    """What will be kept of a teacher with this fingerprint; reads and writes nothing."""
    vocab_size = tokenizer.vocab_size       # rows of the teacher beyond it stand for nothing
    key = [fingerprint, tokenizer.fingerprint, vocab_size, corpus.fingerprint, _SPLIT, context, temperature, top_k,
           precision]
    directory = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    if top_k is None:
        columns = {"next_bytes": ("<f2", _BYTES)}
    else:
        k = min(top_k, vocab_size)
        columns = {"ids": ("<u2" if vocab_size <= 1 << 16 else "<u4", k), "log_p": ("<f2", k + (k < vocab_size))}
    return CachePlan(directory, corpus, tokenizer, context, temperature, top_k, columns)


def write_answers(plan: CachePlan, model: Any, runtime: Runtime, *, progress: Any = None) -> None:
    """Asks the teacher about every token that has no answer yet. `progress(done, total, what)` counts tokens and says
    first how many bytes the answers take. Raises DataError where the disk has not as many."""
    if plan.is_written:
        return
    say = progress or (lambda done, total, what: None)
    plan.directory.mkdir(parents=True, exist_ok=True)
    with turn(plan.directory / "lock", say), explained_disk_errors(f"answers in {plan.directory}"):
        if plan.is_written:
            return
        what = f"asking the teacher once ({_size(plan.bytes)} on disk)"
        say(0, plan.tokens, what)
        columns, done = _open_or_begin(plan)
        reading = _Reading(plan)
        for first in range(done, len(reading.blocks), _BLOCKS_AT_ONCE):
            group = reading.blocks[first:first + _BLOCKS_AT_ONCE]
            _answer(plan, model, runtime, reading, group, columns)
            for column in columns.values():
                column.flush()
            write_json(plan.directory / "progress.json", {"blocks": first + len(group)})
            say(int(reading.place(group[-1])), plan.tokens, what)
        write_json(plan.directory / "manifest.json", {
            "tokens": plan.tokens, "bytes": plan.bytes, "top_k": plan.top_k, "temperature": plan.temperature,
            "context": plan.context, "columns": {name: list(column) for name, column in plan.columns.items()}})


def predict_seconds(plan: CachePlan, model: Any, runtime: Runtime) -> float:
    """How long `write_answers` would take here, from a few blocks; 0 where all are written. Writes nothing."""
    if plan.is_written:
        return 0.0
    reading = _Reading(plan)
    tried = reading.blocks[::max(1, len(reading.blocks) * plan.context // _TRIED_TOKENS)]
    columns = {name: _Nowhere() for name in plan.columns}
    for _ in range(2):      # the first warms up
        began = time.perf_counter()
        _answer(plan, model, runtime, reading, tried, columns)
        seconds = time.perf_counter() - began
    return seconds * len(reading.blocks) / len(tried)


class _Nowhere:
    """A column that keeps nothing."""

    def __setitem__(self, place: Any, values: Any) -> None:
        pass


def _open_or_begin(plan: CachePlan) -> tuple[dict[str, np.memmap], int]:
    """The files, of full size, and the blocks that are done."""
    note = plan.directory / "progress.json"
    done = json.loads(note.read_text("utf-8"))["blocks"] if note.is_file() else 0
    files = {name: plan.directory / f"{name}.bin" for name in plan.columns}
    if not done or not all(path.is_file() for path in files.values()):
        done, free = 0, shutil.disk_usage(plan.directory).free
        if plan.bytes > free:
            raise DataError(f"the teacher's answers take {_size(plan.bytes)} ({plan.tokens:,} tokens), and "
                            f"{plan.directory} has {_size(free)} free.\nTry a smaller objective.top_k, or set "
                            "DOUGONG_CACHE to another disk.")
        for name, path in files.items():
            kind, width = plan.columns[name]
            with open(path, "wb") as file:
                file.truncate(plan.tokens * width * np.dtype(kind).itemsize)
    return {name: np.memmap(files[name], kind, "r+", shape=(plan.tokens, width))
            for name, (kind, width) in plan.columns.items()}, done


class _Reading:
    """The documents as the teacher reads them, cut into blocks: rows of (document, first, end), of which the tokens
    first … end-1 are asked about, and as many before them read as the context has room for."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan, self.store = plan, plan.corpus.tokens(_SPLIT)
        whole = self.store.document_id is None      # one stream without borders
        self.starts = np.asarray([0, self.store.tokens] if whole else self.store.starts, np.int64)
        lengths = np.diff(self.starts) if plan.top_k is not None else self._their_lengths()
        self.blocks = _blocks(lengths, plan.context)

    def place(self, block: np.ndarray) -> int:
        """About how many of the student's tokens lie before the end of a block."""
        return self.starts[block[0]] + min(block[2], self.starts[block[0] + 1] - self.starts[block[0]])

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The teacher's ids of a document, those of its places where the student has a place too, and that one's
        position in the split."""
        start, end = int(self.starts[number]), int(self.starts[number + 1])
        ids = np.asarray(self.store.read(start, end), np.int64)
        if self.plan.top_k is not None:
            return ids, np.arange(len(ids)), np.arange(start, end)
        theirs = self._their_ids(number)
        ours_at, theirs_at = _ends(self._our_bytes[ids]), _ends(self._their_bytes[theirs])
        _, mine, its = np.intersect1d(ours_at, theirs_at, return_indices=True)
        return theirs, its, start + mine

    def _their_ids(self, number: int) -> np.ndarray:
        text = self.plan.corpus.documents(_SPLIT)[number].text
        first = np.array([self.plan.tokenizer.first_id], np.int64)
        return np.concatenate([first, self.plan.tokenizer.encode(text).astype(np.int64)])

    def _their_lengths(self) -> np.ndarray:
        return np.array([len(self._their_ids(number)) for number in range(len(self.store))], np.int64)

    @cached_property
    def _our_bytes(self) -> np.ndarray:
        return _bytes_of(self.plan.corpus.tokenizer)

    @cached_property
    def _their_bytes(self) -> np.ndarray:
        return _bytes_of(self.plan.tokenizer)


def _ends(lengths: np.ndarray) -> np.ndarray:
    """Bytes of text up to the end of each token of a document; the first one is no text, whatever it spells."""
    return np.cumsum(lengths) - lengths[:1]


def _bytes_of(tokenizer: Tokenizer) -> np.ndarray:
    return np.array([len(tokenizer.decode_bytes([token])) for token in range(tokenizer.vocab_size)], np.int64)


def _blocks(lengths: np.ndarray, context: int) -> np.ndarray:
    """(document, first, end) of every block: the first of a document is a whole context, the others half of one."""
    half = max(1, context // 2)
    counts = np.where(lengths > 0, 1 + np.maximum(0, -(-(lengths - context) // half)), 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.where(number > 0, context + (number - 1) * half, 0)
    end = np.minimum(np.where(number > 0, first + half, context), lengths[document])
    return np.stack([document, first, end], -1)


def _answer(plan: CachePlan, model: Any, runtime: Runtime, reading: _Reading, group: np.ndarray,
            columns: Mapping[str, Any]) -> None:
    """Reads a group of blocks, those of similar length together, and writes what the teacher says."""
    documents = {number: reading.document(number) for number in dict.fromkeys(group[:, 0].tolist())}
    group = group[np.argsort(-np.minimum(group[:, 2], plan.context), kind="stable")]
    for rows in _batches(group, plan.context):
        T = max(min(end, plan.context) for _, _, end in rows.tolist())
        tokens_BT = np.zeros((len(rows), T), np.int64)
        asked_BT, places = np.zeros((len(rows), T), bool), []
        for row, (number, first, end) in enumerate(rows.tolist()):
            ids, at, positions = documents[number]
            begin = max(0, end - plan.context)
            tokens_BT[row, :end - begin] = ids[begin:end]
            here = slice(*np.searchsorted(at, [first, end]))
            asked_BT[row, at[here] - begin] = True
            places.append(positions[here])
        place = np.concatenate(places)
        for name, values in _ask(plan, model, runtime, tokens_BT, asked_BT).items():
            columns[name][place] = values


def _batches(group: np.ndarray, context: int) -> Iterator[np.ndarray]:
    begin = 0
    while begin < len(group):
        rows = max(1, _BATCH_TOKENS // min(int(group[begin, 2]), context))
        yield group[begin:begin + rows]
        begin += rows


@torch.no_grad()
def _ask(plan: CachePlan, model: Any, runtime: Runtime, tokens_BT: np.ndarray,
         asked_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of the places asked about, row by row."""
    tokens, asked = (torch.from_numpy(array).to(runtime.device) for array in (tokens_BT, asked_BT))
    hidden_ND = model.hidden(tokens)[asked]
    vocab_size = model.config.vocab_size
    parts: list[dict[str, np.ndarray]] = []
    for part_ND in hidden_ND.split(max(1, _LOGITS_AT_ONCE // vocab_size)):
        logits_NV = model.head(part_ND).float()
        if plan.top_k is not None:
            ids, log_p = top_of(logits_NV[:, :plan.tokenizer.vocab_size], plan.top_k, plan.temperature)
            parts.append({"ids": ids.cpu().numpy(), "log_p": _clamped(log_p)})
        else:
            q_NV = (logits_NV / plan.temperature).softmax(-1)
            parts.append({"next_bytes": _clamped(byte_probabilities(q_NV, _first(plan, vocab_size, q_NV)).log())})
    return {name: np.concatenate([part[name] for part in parts]) for name in plan.columns} if parts else {}


def first_bytes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """The first byte of each id's text; 256 where there is none: a special token, or a row without a token."""
    spelled = [tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size)]
    first = [text[0] if text else _BYTES - 1 for text in spelled]
    return torch.tensor(first + [_BYTES - 1] * (vocab_size - len(first)))


def _first(plan: CachePlan, vocab_size: int, like: Tensor) -> Tensor:
    return first_bytes(plan.tokenizer, vocab_size).to(like.device)


def _clamped(log_p: Tensor) -> np.ndarray:
    return log_p.clamp(min=_LEAST_LOG_P).half().cpu().numpy()


class Answers:
    """The finished files, memory-mapped. Raises DataError where one is not as long as it should be."""

    def __init__(self, plan: CachePlan) -> None:
        for name, (kind, width) in plan.columns.items():
            path, wanted = plan.directory / f"{name}.bin", plan.tokens * width * np.dtype(kind).itemsize
            if not path.is_file() or path.stat().st_size != wanted:
                raise DataError(f"{path} does not hold the {wanted:,} bytes that it should.\nDelete {plan.directory}; "
                                "the teacher will be asked again.")
        self._columns = {name: np.memmap(plan.directory / f"{name}.bin", kind, "r", shape=(plan.tokens, width))
                         for name, (kind, width) in plan.columns.items()}

    def fields(self, places_BT: np.ndarray) -> dict[str, np.ndarray]:
        """The fields that `objectives.distil` reads, for tokens at these places of the split."""
        if "ids" in self._columns:
            return {"teacher_ids": self._columns["ids"][places_BT].astype(np.int32),
                    "teacher_log_p": self._columns["log_p"][places_BT]}
        log_p = self._columns["next_bytes"][places_BT]
        unwritten = (log_p[..., :2] == 0).all(-1)       # two bytes cannot both be certain
        log_p[unwritten] = np.nan
        return {"teacher_bytes": log_p}


def with_answers(corpus: Any, plan: CachePlan) -> Any:
    """The corpus, each row of its training split with what the teacher says of its tokens."""
    return corpus.with_fields(_SPLIT, Answers(plan).fields)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
