"""From sources to a document store: read, remove duplicates, split, and write down what happened."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dougong.core.config import to_dict
from dougong.core.errors import DataError
from dougong.core.files import explained_disk_errors, lock, sha256, sync_directory, write_json
from dougong.data.dedup import (
    HASHES,
    DedupConfig,
    digest,
    exact_duplicates,
    jaccard,
    near_duplicates,
    shingles,
    signature,
)
from dougong.data.documents import FACTS, FORMAT, INDEX, NAMES, TEXT, DocumentStore, read_facts
from dougong.data.split import ROW, SPLITS, Division, SplitConfig, divide
from dougong.data.walk import Skipped
from dougong.runtime.seeds import derive

if TYPE_CHECKING:
    from dougong.data.sources import Source

Progress = Callable[[int, int | None, str], None]
_ROWS_AT_ONCE = 1 << 16
_EXAMPLES = 20
_REPORT_EVERY = 1 << 20
_NO_PLAIN_TEXT = re.compile(r"\.(pdf|docx?|odt|epub)( \(|$)", re.IGNORECASE)     # a name, or `name (where)`


def source_fingerprint(sources: Sequence["Source"]) -> str:
    """A cheap key of what the sources hold: their configs, the names, sizes and times of their files, and
    what they say of themselves (the Python version). A hub's dataset shows no change but its `revision`."""
    key = hashlib.sha256()
    for source in sources:
        settings = {name: value for name, value in to_dict(source).items() if name != "weight"}
        key.update(json.dumps([settings, source.about()], sort_keys=True).encode())
        for entry in source.inventory():
            key.update(repr(entry).encode())
    return key.hexdigest()


def materialise(sources: Sequence["Source"], directory: Path | str, *, dedup: DedupConfig | None = None,
                split: SplitConfig | None = None, context_bytes: int = 1024, seed: int = 0,
                progress: Progress | None = None) -> DocumentStore:
    """Makes (or, where nothing changed since, reopens) the document store of `sources` in `directory`.

    `context_bytes` is the gap of the tail rule. `progress(done_bytes, total_bytes or None, what)` is called
    about once a megabyte. What an interrupted call left is built anew. Raises DataError where a source holds
    no document or a split would be empty; CheckpointError while another process builds the same directory.
    """
    directory, dedup, split = Path(directory), dedup or DedupConfig(), split or SplitConfig()
    asked = {"sources": source_fingerprint(sources), "dedup": to_dict(dedup), "split": to_dict(split),
             "context_bytes": context_bytes, "seed": seed}
    asked = json.loads(json.dumps(asked))
    facts = read_facts(directory)
    if facts is not None and facts["asked"] == asked:
        return DocumentStore.open(directory)
    with (explained_disk_errors(f"the document store {directory}"),
          lock(directory / "lock", owner="a preparation of data")):
        building = directory / "building"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        facts = _Build(sources, building, dedup, progress).run(split, context_bytes, seed)
        (directory / FACTS).unlink(missing_ok=True)   # not valid until the new facts are there
        for name in facts["files"]:
            (building / name).replace(directory / name)
        sync_directory(directory)
        write_json(directory / FACTS, {"format": FORMAT, "asked": asked, **facts})
        shutil.rmtree(building)
    return DocumentStore.open(directory)


class _Build:
    """One construction of a store in an empty directory."""

    def __init__(self, sources: Sequence["Source"], folder: Path, dedup: DedupConfig,
                 progress: Progress | None) -> None:
        self.sources, self.folder, self.dedup = sources, folder, dedup
        self.progress = progress or (lambda done, total, what: None)
        self.labels = _distinct([source.label for source in sources])
        self.skipped = [Skipped() for _ in sources]
        self.bounds = [0]   # the first document of each source, and the end

    def run(self, split: SplitConfig, context_bytes: int, seed: int) -> dict[str, Any]:
        self.read()
        duplicates = self.find_duplicates()
        divisions = [divide(lambda s=s: self.kept(s), self.text, split, context_bytes=context_bytes,
                            seed=derive(seed, "split")) for s in range(len(self.sources))]
        counts = self.write_index(divisions)
        _refuse_empty_splits(split, counts, divisions)
        return self.facts(split, divisions, counts, duplicates)

    # ---- reading

    def read(self) -> None:
        totals = [source.total_bytes() for source in self.sources]
        total = None if None in totals else sum(t for t in totals if t is not None)
        self.done, reported = 0, 0
        with (open(self.folder / TEXT, "wb") as text, open(self.folder / NAMES, "wb") as names,
              open(self.folder / "rows", "wb") as rows, open(self.folder / "digests", "wb") as digests,
              open(self.folder / "signatures", "wb") as signatures):
            for s, source in enumerate(self.sources):
                count = 0
                for document in source.documents(self.skipped[s]):
                    try:
                        data = document.text.encode()
                    except UnicodeEncodeError as error:   # JSON can hold half of a surrogate pair
                        self.skipped[s].add("lone surrogate", document.id, f"character {error.start}")
                        continue
                    name = document.id.encode("utf-8", "replace")
                    row = (text.tell(), text.tell() + len(data), names.tell(), names.tell() + len(name), s)
                    text.write(data)
                    names.write(name)
                    rows.write(np.array(row, ROW).tobytes())
                    digests.write(digest(document.text))
                    if self.dedup.near:
                        signatures.write(signature(shingles(document.text, self.dedup.shingle)).tobytes())
                    count, self.done = count + 1, self.done + len(data)
                    if self.done - reported >= _REPORT_EVERY:
                        reported = self.done
                        self.progress(self.done, None if total is None else max(total, self.done), "reading")
                if not count:
                    raise _nothing(source, self.skipped[s])
                self.bounds.append(self.bounds[-1] + count)
        self.progress(self.done, self.done, "reading")
        self.text = np.memmap(self.folder / TEXT, np.uint8, "r")
        self.rows = np.memmap(self.folder / "rows", ROW, "r")
        self.digests = np.memmap(self.folder / "digests", np.uint64, "r").reshape(-1, 2)

    def text_of(self, i: int) -> str:
        return self.text[self.rows[i]["start"]:self.rows[i]["stop"]].tobytes().decode()

    def name_of(self, i: int) -> str:
        with open(self.folder / NAMES, "rb") as names:
            names.seek(self.rows[i]["name_start"])
            return names.read(int(self.rows[i]["name_stop"] - self.rows[i]["name_start"])).decode()

    # ---- duplicates

    def find_duplicates(self) -> dict[str, Any]:
        """Fills `exact` and `near` (for each document the one it repeats, or -1) and returns the facts."""
        count = len(self.rows)
        self.exact = self.near = np.broadcast_to(np.int64(-1), (count,))
        if self.dedup.exact:
            self.exact = exact_duplicates(self.digests, self.folder / "exact")
        if self.dedup.near:
            def told(band: int, bands: int) -> None:
                self.progress(self.done * band // bands, self.done, "near duplicates")

            signatures = np.memmap(self.folder / "signatures", np.uint32, "r").reshape(-1, HASHES)
            self.near = near_duplicates(signatures, self.exact, self.shingles_of, self.dedup.threshold,
                                        self.folder, progress=told)
        return {"searched": {"exact": self.dedup.exact, "near": self.dedup.near},
                "exact": self.removed(self.exact), "near": self.removed(self.near, measured=True),
                "threshold": self.dedup.threshold}

    def shingles_of(self, i: int) -> np.ndarray:
        return shingles(self.text_of(i), self.dedup.shingle)

    def removed(self, keeper: np.ndarray, *, measured: bool = False) -> dict[str, Any]:
        documents, size, examples = 0, 0, []
        for at in range(0, len(keeper), _ROWS_AT_ONCE):
            places = np.flatnonzero(keeper[at:at + _ROWS_AT_ONCE] >= 0) + at
            documents += len(places)
            size += int((self.rows["stop"][places] - self.rows["start"][places]).sum())
            for i in places[:_EXAMPLES - len(examples)].tolist():
                pair: dict[str, Any] = {"removed": self.name_of(i), "kept": self.name_of(int(keeper[i]))}
                if measured:
                    pair["jaccard"] = round(jaccard(self.shingles_of(i), self.shingles_of(int(keeper[i]))), 4)
                examples.append(pair)
        return {"documents": documents, "bytes": size, "examples": examples}

    # ---- split and index

    def kept(self, s: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows and digests of one source's documents that are no duplicates, in order."""
        for at in range(self.bounds[s], self.bounds[s + 1], _ROWS_AT_ONCE):
            part = slice(at, min(at + _ROWS_AT_ONCE, self.bounds[s + 1]))
            keep = (self.exact[part] < 0) & (self.near[part] < 0)
            yield self.rows[part][keep], self.digests[part][keep]

    def write_index(self, divisions: list[Division]) -> np.ndarray:
        """Writes the index, split by split; returns (split, source, documents|bytes) counts."""
        counts = np.zeros((len(SPLITS), len(self.sources), 2), np.int64)
        with open(self.folder / INDEX, "wb") as index:
            for k in range(len(SPLITS)):
                for s, division in enumerate(divisions):
                    for rows in division.rows(k):
                        index.write(np.ascontiguousarray(rows).tobytes())
                        counts[k, s] += len(rows), (rows["stop"] - rows["start"]).sum()
        return counts

    def facts(self, split: SplitConfig, divisions: list[Division], counts: np.ndarray,
              duplicates: dict[str, Any]) -> dict[str, Any]:
        files = {name: {"bytes": (self.folder / name).stat().st_size, "sha256": sha256(self.folder / name)}
                 for name in (TEXT, NAMES, INDEX)}
        content = json.dumps([files[TEXT]["sha256"], files[INDEX]["sha256"], self.labels])
        sources = []
        for s, source in enumerate(self.sources):
            read = self.rows[self.bounds[s]:self.bounds[s + 1]]
            sources.append({
                "name": self.labels[s], "kind": source.kind, "weight": source.weight,
                **_counted(counts[:, s].sum(0)),
                "read": {"documents": len(read), "bytes": int((read["stop"] - read["start"]).sum())},
                "splits": {name: _counted(counts[k, s]) for k, name in enumerate(SPLITS)},
                "rule": divisions[s].rule, "reason": divisions[s].reason,
                "skipped": self.skipped[s].facts(), "about": source.about()})
        return {**_counted(counts.sum((0, 1))), "read": {"documents": len(self.rows), "bytes": self.done},
                "splits": {name: _counted(counts[k].sum(0)) for k, name in enumerate(SPLITS)},
                "skipped": _together(self.skipped), "duplicates": duplicates,
                "split": _split_facts(split, divisions, self.labels), "sources": sources, "files": files,
                "fingerprint": hashlib.sha256(content.encode()).hexdigest()}


def _counted(pair: np.ndarray) -> dict[str, int]:
    return {"documents": int(pair[0]), "bytes": int(pair[1])}


def _together(skipped: list[Skipped]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for one in skipped:
        for reason, fact in one.facts().items():
            entry = total.setdefault(reason, {"count": 0, "examples": []})
            entry["count"] += fact["count"]
            entry["examples"] = (entry["examples"] + fact["examples"])[:_EXAMPLES]
    return total


def _split_facts(split: SplitConfig, divisions: list[Division], labels: list[str]) -> dict[str, Any]:
    rules = {division.rule for division in divisions}
    sentences = [f"{label}: {_SENTENCES[division.rule].format(gap=division.gap_bytes)} ({division.reason})."
                 for label, division in zip(labels, divisions)]
    return {"rule": rules.pop() if len(rules) == 1 else "mixed", "sentence": " ".join(sentences),
            "fractions": list(split.fractions),
            "gap_bytes": max(division.gap_bytes for division in divisions)}


_SENTENCES = {"documents": "split by a hash of each document, so none is on both sides",
              "tail": "split by contiguous tail, {gap} bytes left out before each cut"}


def _distinct(labels: list[str]) -> list[str]:
    """The labels, with -2, -3, … behind those that an earlier source has."""
    taken: list[str] = []
    for label in labels:
        number, name = 1, label
        while name in taken:
            number += 1
            name = f"{label}-{number}"
        taken.append(name)
    return taken


def _nothing(source: "Source", skipped: Skipped) -> DataError:
    where = getattr(source, "path", None) or getattr(source, "dataset", None) or source.label
    return DataError(f"no usable document in {where!r} (source kind={source.kind}). Skipped:\n{skipped}\n"
                     "What fits: UTF-8 text or code of any language, .jsonl or .parquet records with the "
                     f"field `text`, also .gz, .xz, .zst.\n{_convert(skipped)}"
                     "Try another path, encoding=gb18030 (or what the files are in), or fields=[…] for "
                     "records with other names.")


def _convert(skipped: Skipped) -> str:
    """What to do with documents of programs that write no plain text, where the names of what was skipped show some."""
    names = (name for fact in skipped.facts().values() for name in fact["examples"])
    if not any(_NO_PLAIN_TEXT.search(name) for name in names):
        return ""
    return ("PDF, Word and e-book files are not read: convert them first, such as `pdftotext FILE.pdf` or "
            "`pandoc -t plain -o FILE.txt FILE.docx`.\n")


def _refuse_empty_splits(split: SplitConfig, counts: np.ndarray, divisions: list[Division]) -> None:
    for k, name in enumerate(SPLITS):
        if split.fractions[k] and not counts[k, :, 1].sum():
            total, gap = int(counts[:, :, 1].sum()), max(division.gap_bytes for division in divisions)
            raise DataError(f"the corpus is too small: its {total:,} bytes leave nothing for {name} "
                            f"({split.fractions[k]:.0%}, with a gap of {gap:,} bytes before each cut).\n"
                            "Add text, make the context shorter, or set the split: "
                            "'data.split.fractions=[0.8,0.2,0]' data.split.gap_bytes=0")
