"""The whole evaluation of a language model on one split: its bits per byte beside the baselines' on the same
documents.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from dougong.evaluate.bits_per_byte import BitsPerByte, bits_per_byte
from dougong.evaluate.calibration import Calibration
from dougong.evaluate.compressors import xz_concatenated, xz_per_document
from dougong.evaluate.kneser_ney import KneserNey
from dougong.evaluate.scores import DocumentScores
from dougong.evaluate.statistics import paired_difference
from dougong.runtime.device import Runtime

Baseline = Literal["5-gram", "xz"]


@dataclass(frozen=True)
class Comparison:
    """A model's scores and the baselines' on the same documents. `notes` are figures without an interval."""

    split: str
    scores: BitsPerByte
    baselines: list[DocumentScores]
    notes: list[dict[str, Any]] = field(default_factory=list)
    weights: str = "raw"
    seed: int = 0
    calibration: Calibration | None = None

    def payload(self) -> dict[str, Any]:
        """The fields of a `result` event, as JSON values.

        A baseline's `difference` is the model's bits per byte minus the baseline's, with its paired 95 %
        interval over documents: an interval below 0 says that the model is better.
        """
        interval = self.scores.interval(seed=self.seed)
        return {"split": self.split, "bits_per_byte": self.scores.bits_per_byte, "interval": _list(interval),
                "baselines": [self._against(baseline) for baseline in self.baselines], "notes": self.notes,
                "sources": self.scores.by_source(), "context": self.scores.context,
                "stride": self.scores.stride, "weights": self.weights, "loss": self.scores.nats_per_token,
                "documents": len(self.scores.ids), "tokens": int(self.scores.tokens.sum()),
                "bytes": int(self.scores.bytes.sum()),
                "lossy": self.scores.lossy, "seconds": self.scores.seconds,
                **({"calibration": self.calibration.payload()} if self.calibration else {})}

    def _against(self, baseline: DocumentScores) -> dict[str, Any]:
        difference, interval = paired_difference(self.scores, baseline, seed=self.seed)
        return {"name": baseline.name, "bits_per_byte": baseline.bits_per_byte, "difference": difference,
                "interval": _list(interval)}


def evaluate_split(model: nn.Module, tokenizer, documents: Sequence, *, context: int,
                   training_documents: Iterable | None = None, stride: int | None = None,
                   split: str = "validation", weights: str = "raw",
                   baselines: Sequence[Baseline] = ("5-gram", "xz"), runtime: Runtime | None = None,
                   batch_tokens: int = 8192, seed: int = 0,
                   progress: Callable[[str], None] | None = None) -> Comparison:
    """Scores the model, then each baseline, on every document of a split.

    `documents` is read several times (a DocumentView or a list). The 5-gram learns from `training_documents`
    and is left out without them. `progress` hears what begins. Raises what `bits_per_byte` raises.
    """
    say = progress or (lambda message: None)
    say(f"bits per byte of {len(documents)} documents")
    sureness = Calibration()
    scores = bits_per_byte(model, tokenizer, documents, context=context, stride=stride, runtime=runtime,
                           batch_tokens=batch_tokens, calibration=sureness)
    others: list[DocumentScores] = []
    notes: list[dict[str, Any]] = []
    if "5-gram" in baselines and training_documents is not None:
        say("byte 5-gram (interpolated modified Kneser–Ney) on the training split")
        ngram = KneserNey(5).fit(document.text.encode("utf-8") for document in training_documents)
        others.append(ngram.score(documents))
    if "xz" in baselines:
        say("xz -9")
        others.append(xz_per_document(documents))
        notes.append({"name": "xz -9 of all documents concatenated",
                      "bits_per_byte": xz_concatenated(documents)})
    return Comparison(split, scores, others, notes, weights, seed, sureness)


def _list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
