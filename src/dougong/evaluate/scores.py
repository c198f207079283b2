"""Columns of what a compressor or a model spends on each document; every comparison starts from these."""

from dataclasses import dataclass
from typing import Any

import numpy as np

NATS_PER_BIT = float(np.log(2))


@dataclass(frozen=True)
class DocumentScores:
    """One row per document: its id, its source, the nats it costs and its UTF-8 bytes.

    Two columns over the same documents in the same order can be compared in pairs.
    """

    name: str
    ids: list[str]
    sources: list[str]
    nats: np.ndarray
    bytes: np.ndarray

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.sources) == len(self.nats) == len(self.bytes)
        assert np.isfinite(self.nats).all(), f"{self.name}: a document costs {self.nats.max()} nats"

    @property
    def bits_per_byte(self) -> float:
        """Σ nats / Σ bytes, in bits: long documents weigh more, as in one archive of all of them."""
        return float(self.nats.sum() / self.bytes.sum() / NATS_PER_BIT)

    def by_source(self) -> list[dict[str, Any]]:
        """One row per source, in order of first appearance: documents, bytes, bits_per_byte."""
        rows = []
        names = np.array(self.sources, dtype=object)
        for source in dict.fromkeys(self.sources):
            of = names == source
            total = int(self.bytes[of].sum())
            bits = float(self.nats[of].sum() / total / NATS_PER_BIT) if total else None
            rows.append({"source": source, "documents": int(of.sum()), "bytes": total, "bits_per_byte": bits})
        return rows
