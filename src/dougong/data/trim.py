"""A BPE tokenizer without the tokens that a text does not need. It still spells any text, and that one as before.

Why that text is cut as before. A merge that happens on the way to a token is part of how that token is made, and all
parts of what is kept are kept. So a merge that is left out never happened in the text, and none happens instead. In
other texts a token that is gone appears as its parts, down to single bytes, which always stay.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer as HuggingFaceTokenizer

from dougong.core.errors import ConfigError
from dougong.data.bpe import BYTES, byte_alphabet
from dougong.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Trimmed:
    """The smaller tokenizer. `kept[i]` is the old id of its token i; `used` of them the text has itself, the others
    spell these or any text."""

    tokenizer: Tokenizer
    kept: np.ndarray
    used: int


def token_counts(tokenizer: Tokenizer, ids: Iterable[np.ndarray]) -> np.ndarray:
    """How often each token occurs."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for part in ids:
        counts += np.bincount(part, minlength=len(counts))
    return counts


def trim(tokenizer: Tokenizer, counts: np.ndarray, *, least: int = 1) -> Trimmed:
    """Keeps tokens that occur at least `least` times, all that they are merged from, all bytes, and all added tokens.

    The order of ids stays, so ranks of merges still ascend with them. Raises ConfigError for tokenizers that are not
    BPE, whose tokens are not made of each other.
    """
    spec = json.loads(tokenizer.backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or not model.get("merges"):
        raise ConfigError(f"this tokenizer is {model['type']} {'without merges ' if model['type'] == 'BPE' else ''}and "
                          "cannot be trimmed: only of BPE is it known which tokens the others are made of.")
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    prefix = model.get("continuing_subword_prefix") or ""
    used = {token for token, index in vocabulary.items() if counts[index] >= least}
    wanted = _with_parts(used | _spelling(vocabulary), merges, prefix)
    added = {token["id"] for token in spec["added_tokens"]}
    kept = np.array(sorted({vocabulary[token] for token in wanted} | added), np.int64)
    place = {int(old): new for new, old in enumerate(kept)}
    model["vocab"] = {token: place[index] for token, index in vocabulary.items() if index in place}
    model["merges"] = [list(merge) for merge in merges
                       if merge[0] in wanted and merge[1] in wanted and _joined(merge, prefix) in wanted]
    for token in spec["added_tokens"]:
        token["id"] = place[token["id"]]
    _renumber(spec.get("post_processor"), place)
    backend = HuggingFaceTokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    document_id = None if tokenizer.document_id is None else place[tokenizer.document_id]
    return Trimmed(Tokenizer(backend, document_id=document_id, settings=tokenizer.settings), kept, len(used))


def _spelling(vocabulary: dict[str, int]) -> set[str]:
    """What spells any text: the stand-ins of bytes, or the names of bytes that an unknown character falls back on."""
    names = {*byte_alphabet(), *(f"<0x{byte:02X}>" for byte in range(BYTES))}
    return {token for token in vocabulary if token in names}


def _with_parts(tokens: Iterable[str], merges: Sequence[tuple[str, ...]], prefix: str) -> set[str]:
    """These tokens, and whatever any merge makes them from, all the way down."""
    parts = defaultdict(list)
    for merge in merges:
        parts[_joined(merge, prefix)].append(merge)
    found, open_ = set(), list(tokens)
    while open_:
        token = open_.pop()
        if token not in found:
            found.add(token)
            open_ += [part for merge in parts[token] for part in merge]
    return found


def _joined(merge: Sequence[str], prefix: str) -> str:
    return merge[0] + merge[1].removeprefix(prefix)


def _renumber(part: Any, place: dict[int, int]) -> None:
    """New ids in the templates that add special tokens."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "ids" and isinstance(value, list):
                part[key] = [place[index] for index in value]
            else:
                _renumber(value, place)
    elif isinstance(part, list):
        for value in part:
            _renumber(value, place)
