"""A prepared text corpus: documents, tokens and rows of every split, and the facts a report tells of them."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dougong.core.errors import DataError
from dougong.data.batch import Batch
from dougong.data.documents import DocumentStore, DocumentView
from dougong.data.loader import Loader, batches_in_order
from dougong.data.mix import Mixture
from dougong.data.pack import BestFit, Stream, Windows, WithFields, choose_method, index_name
from dougong.data.shards import TokenStore
from dougong.data.split import SPLITS
from dougong.data.tokenizer import Tokenizer

Packing = Literal["auto", "best_fit", "windows"]


class Corpus:
    """What `prepare` returns. `weights`: per source, how often its text is seen, relative to the others'.

    With equal weights all sources share rows and an epoch is every token once. Otherwise each source has rows
    and shuffles of its own, and the loader mixes them by quota.
    """

    def __init__(
        self,
        store: DocumentStore,
        tokenizer: Tokenizer,
        tokens: dict[str, TokenStore],
        *,
        context: int,
        packing: Packing = "auto",
        weights: dict[str, float] | None = None,
    ) -> None:
        self.store, self.tokenizer, self._tokens, self.context = store, tokenizer, tokens, context
        self._weights = weights if weights and len(set(weights.values())) > 1 else {}
        self._refuse_too_small()
        chosen, reason = choose_method(tokens["train"], context)
        self.method, self.reason = chosen, reason
        if packing != "auto":
            self.method, self.reason = packing, "asked for by data.pack"
        self._packs: dict[str, dict[str, Any]] = {split: self._pack(split) for split in SPLITS}
        self.facts = self._gather_facts()

    @property
    def fingerprint(self) -> str:
        """Changes with any document, its order or split, and the tokenizer; not with context or packing."""
        return hashlib.sha256(f"{self.store.fingerprint} {self.tokenizer.fingerprint}".encode()).hexdigest()

    def documents(self, split: str) -> DocumentView:
        """The text of one split, document by document."""
        return self.store.split(split)

    def tokens(self, split: str) -> TokenStore:
        """The tokens of one split, in the order of its documents."""
        return self._tokens[split]

    def loader(self, split: str, *, rows: int, seed: int, rank: int = 0, world_size: int = 1) -> Loader:
        """Endless shuffled batches of `rows` contexts in all. Raises DataError for an empty split."""
        return Loader(list(self._rows_of(split).values()), rows=rows, seed=seed, shares=self._shares(split),
                      fingerprint=f"{self.fingerprint}-{split}", rank=rank, world_size=world_size,
                      name=lambda number: self.documents(split)[number].id)

    def batches(self, split: str, *, rows: int) -> Iterator[Batch]:
        """Every row of the split once, in order: for a loss over the whole of it."""
        return batches_in_order(list(self._rows_of(split).values()), rows)

    def with_fields(self, split: str, more: Callable[[np.ndarray], dict[str, np.ndarray]]) -> "Corpus":
        """The same corpus, the rows of one split with more fields: `more(places)` gives them for the places of tokens
        in the split, (rows, context)."""
        changed = copy.copy(self)
        changed._packs = {**self._packs, split: {name: WithFields(pack, more)
                                                 for name, pack in self._packs[split].items()}}
        return changed

    def _rows_of(self, split: str) -> dict[str, Any]:
        if not self._packs.get(split):
            raise DataError(
                f"the split {split!r} has no documents. "
                f"Splits with some: {', '.join(name for name, packs in self._packs.items() if packs)}."
            )
        return self._packs[split]

    def _pack(self, split: str) -> dict[str, Windows | BestFit]:
        """The rows of each group of documents: all of them, or each source's, which lie together."""
        store = self._tokens[split]
        if not len(store):
            return {}
        groups = {"": Stream(store, 0, len(store))}
        if self._weights:
            borders = np.flatnonzero(np.diff(store.source_of, prepend=-1, append=-1)).tolist()
            assert len(borders) == len(set(store.source_of.tolist())) + 1, (
                "documents of a source do not lie together"
            )
            groups = {store.sources[store.source_of[first]]: Stream(store, first, last)
                      for first, last in pairwise(borders)}
        return {name: self._pack_stream(stream) for name, stream in groups.items() if stream.tokens}

    def _pack_stream(self, stream: Stream) -> Windows | BestFit:
        if self.method == "windows":
            return Windows(stream, self.context)
        return BestFit(stream, self.context, stream.store.directory / index_name(stream, self.context))

    def _shares(self, split: str) -> list[float] | None:
        if not self._weights:
            return None
        return [self._weights[name] * pack.rows for name, pack in self._rows_of(split).items()]

    def _refuse_too_small(self) -> None:
        have = self._tokens["train"].tokens
        if have < self.context:
            size = self.store.facts["splits"]["train"]["bytes"]
            raise DataError(
                f"the training split holds {have:,} tokens ({size:,} bytes of text), fewer than one context "
                f"of {self.context:,}.\nAdd text, or try a context of {max(1, have // 8)} or less."
            )

    def _gather_facts(self) -> dict[str, Any]:
        """One JSON-able dict: the documents' own facts, and what tokenizing and packing made of them."""
        known = self.store.facts
        splits = {split: self._split_facts(split) for split in SPLITS}
        totals = {
            name: sum(facts[name] for facts in splits.values()) for name in ("documents", "bytes", "tokens")
        }
        return {
            "fingerprint": self.fingerprint,
            "context": self.context,
            **_per_token(totals),
            "splits": splits,
            "sources": self._source_facts(),
            "packing": {"method": self.method, "reason": self.reason},
            "tokenizer": self.tokenizer.facts(),
            "skipped": known["skipped"],
            "duplicates": known["duplicates"],
            "split": known["split"],
        }

    def _split_facts(self, split: str) -> dict[str, Any]:
        sources = self._tokens[split].per_source()
        totals = {
            name: sum(facts[name] for facts in sources.values()) for name in ("documents", "bytes", "tokens")
        }
        packs = list(self._packs[split].values())
        rows = sum(pack.rows for pack in packs)
        packing = {"rows": rows, "documents_cut": sum(pack.facts()["documents_cut"] for pack in packs),
                   "padding_share": 1 - totals["tokens"] / (rows * self.context) if rows else 0.0}
        return {**_per_token(totals), "sources": {name: _per_token(facts) for name, facts in sources.items()},
                "packing": packing}

    def _source_facts(self) -> list[dict[str, Any]]:
        """The facts of each source, with its weight, its share of the rows and its passes per epoch."""
        packs = self._packs["train"]
        shares = Mixture([p.rows for p in packs.values()], self._shares("train") or [1.0], 0).shares
        share_of = dict(zip(packs, shares))
        tokens = self._tokens["train"].per_source()
        total, rows = self._tokens["train"].tokens, sum(pack.rows for pack in packs.values())
        facts = []
        for source in self.store.facts["sources"]:
            name = source["name"]
            if self._weights:
                share = share_of.get(name, 0.0)
                passes = share * rows / packs[name].rows if name in packs else 0.0
            else:
                share, passes = tokens.get(name, {"tokens": 0})["tokens"] / total, 1.0
            facts.append(
                {**source, "weight": self._weights.get(name, 1.0), "share": share, "passes_per_epoch": passes}
            )
        return facts


def _per_token(facts: dict[str, Any]) -> dict[str, Any]:
    return {**facts, "bytes_per_token": facts["bytes"] / facts["tokens"] if facts["tokens"] else 0.0}


def tokens_directory(cache: Path, store: DocumentStore, tokenizer: Tokenizer) -> Path:
    """Where the tokens of these documents under this tokenizer are kept."""
    key = hashlib.sha256(f"{store.fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()
    return cache / "tokens" / key[:24]
