"""`prepare`: from files to a corpus that can be trained on. Every stage is kept, found again, and safe to
interrupt.

```
CACHE/documents/KEY/    text, duplicates removed, split      KEY: the sources' files and every setting
      tokenizers/KEY/   a Hugging Face tokenizer directory   KEY: the documents' fingerprint and the settings
      tokens/KEY/SPLIT/ token shards and pack indices        KEY: fingerprints of documents and tokenizer
```
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dougong.core.config import chosen_from, config, to_dict
from dougong.core.errors import CheckpointError, ConfigError
from dougong.core.files import default_cache, lock
from dougong.data import SOURCES
from dougong.data.corpus import Corpus, Packing, tokens_directory
from dougong.data.decode import check_encoding
from dougong.data.dedup import DedupConfig
from dougong.data.documents import DocumentStore
from dougong.data.materialise import Progress, materialise, source_fingerprint
from dougong.data.shards import write_shards
from dougong.data.sources import FilesSource, HuggingFaceSource, PythonSource
from dougong.data.split import SPLITS, SplitConfig
from dougong.data.tokenizer import Tokenizer

_BYTES_PER_TOKEN = {"bytes": 1, "characters": 4}    # at most; other kinds: _LONG_TOKEN
_LONG_TOKEN = 8
_WAIT_S = 0.2


@config
class TextData:
    """Text: any mixture of sources, cleaned of duplicates, split, tokenised and packed."""

    kind: Literal["text"] = "text"
    path: str | None = None
    """a folder, file or glob of text, code, .jsonl or .parquet, or a saved Hugging Face dataset; short for
    one source"""
    encoding: str | None = None
    """of the files at `path` that do not say themselves, such as gb18030; None: UTF-8"""
    sources: tuple[Annotated[Any, chosen_from(SOURCES)], ...] = ()
    """where the documents come from; with neither path nor sources: the Python installation itself"""
    own: bool = False
    """a text of your own is needed: nothing stands in where neither is given"""
    dedup: DedupConfig = Field(default_factory=DedupConfig)
    """removal of exact and near duplicates"""
    split: SplitConfig = Field(default_factory=SplitConfig)
    """division into training, validation and test"""
    pack: Packing = "auto"
    """how documents fill contexts; auto: windows where most tokens are in documents longer than a context"""

    def __post_init__(self) -> None:
        if self.path is not None and self.sources:
            raise ConfigError("data.path and data.sources are both given. data.path is short for one source: "
                              "leave it out, or add {kind: files, path: …} to data.sources.")
        if self.encoding is not None:
            check_encoding(self.encoding)
            if self.path is None:
                raise ConfigError(
                    f"data.encoding={self.encoding} has no effect without data.path. "
                    "Set it inside the source it belongs to: {kind: files, path: …, encoding: …}."
                )

    def resolved_sources(self) -> tuple[Any, ...]:
        """The sources to read: those given, the one `path` stands for, or the Python installation."""
        if self.path is None:
            if self.own and not self.sources:
                raise ConfigError("this recipe learns from a text of your own, and none is given. Name a folder, a "
                                  "file or a glob: data.path=~/texts")
            return self.sources or (PythonSource(),)
        folder = Path(self.path).expanduser()
        if any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            return (HuggingFaceSource(dataset=self.path),)
        return (FilesSource(path=self.path, encoding=self.encoding),)

    def prepare(self, tokenizer: Any, **options: Any) -> Corpus:
        """`prepare(self, tokenizer, …)`."""
        return prepare(self, tokenizer, **options)


def prepare(data: TextData, tokenizer: Any, *, context: int, cache: Path | str | None = None, seed: int = 0,
            progress: Progress | None = None) -> Corpus:
    """Makes, or finds in the cache, everything from documents to rows of `context` tokens.

    `tokenizer` is a config of `TOKENIZERS`. `progress(done_bytes, total_bytes or None, what)` is called as
    work goes on. Interrupted at any moment, the next call goes on and ends with the same files; several
    processes may call at once, one works and the others wait. Raises DataError for data that cannot be used.
    """
    if context < 1:
        raise ConfigError(f"a context of {context} tokens cannot be filled. Try 256.")
    cache = Path(cache) if cache is not None else default_cache()
    report = progress or (lambda done, total, what: None)
    sources = data.resolved_sources()
    store = _documents(data, sources, cache, _gap_bytes(tokenizer, context), seed, report)
    chosen = ready_tokenizer(tokenizer, store, cache, seed, report)
    directory = tokens_directory(cache, store, chosen)
    with turn(directory / "lock", report):
        tokens = {
            split: write_shards(
                store.split(split), chosen, directory / split, stage=f"tokenising {split}", progress=report
            )
            for split in SPLITS
        }
        weights = {name: source.weight for name, source in zip(store.sources, sources)}
        return Corpus(store, chosen, tokens, context=context, packing=data.pack, weights=weights)


def _documents(data: TextData, sources: tuple, cache: Path, gap_bytes: int, seed: int,
               report: Progress) -> DocumentStore:
    asked = [source_fingerprint(sources), to_dict(data.dedup), to_dict(data.split), gap_bytes, seed]
    directory = cache / "documents" / key_of(asked)
    with turn(directory.with_suffix(".lock"), report):
        return materialise(
            sources,
            directory,
            dedup=data.dedup,
            split=data.split,
            context_bytes=gap_bytes,
            seed=seed,
            progress=report,
        )


def ready_tokenizer(section: Any, store: Any, cache: Path, seed: int, report: Progress) -> Tokenizer:
    """Trains the tokenizer, or loads the one trained on these documents before."""
    documents = store.split("train")
    if section.kind not in ("bpe", "characters"):     # nothing to learn: made anew in no time
        return section.build(documents, seed=seed)
    directory = cache / "tokenizers" / key_of([store.fingerprint, to_dict(section), seed])
    with turn(directory.with_suffix(".lock"), report):
        if not directory.is_dir():
            report(0, documents.bytes, f"training the tokenizer ({section.kind})")
            partial = directory.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            section.build(documents, seed=seed).save(partial)
            partial.replace(directory)
        return Tokenizer.load(directory)


def _gap_bytes(tokenizer: Any, context: int) -> int:
    """Bytes that surely hold one context, rounded up to a power of two: near contexts share documents."""
    widest = context * _BYTES_PER_TOKEN.get(tokenizer.kind, _LONG_TOKEN)
    return 1 << (widest - 1).bit_length()


def key_of(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


@contextlib.contextmanager
def turn(path: Path, report: Progress) -> Iterator[None]:
    """Holds the lock of something in the cache; while another process has it, waits and says so once."""
    said = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(path, owner="dougong data prepare"))
                break
            except CheckpointError:
                if not said:
                    report(
                        0,
                        None,
                        f"waiting for another process that prepares the same data ({path.parent.name})",
                    )
                said = True
                time.sleep(_WAIT_S)
        yield
