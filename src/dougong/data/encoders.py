"""Text to token ids, fast: tiktoken or numpy where their ids are proven equal to Hugging Face's, else Hugging
Face's.

Why tiktoken agrees. BPE training merges pairs in the order of their rank, and a token's id here ascends with
that rank. Inside any span whose ends are token borders, merging goes on as if the span stood alone; so
wherever two neighbours spell a token, they are the very pair it was learned from, and choosing by pair
(Hugging Face) or by the id of the joined bytes (tiktoken) is the same choice. What is left to differ is the
splitting rule, run by two different regex engines: `proven_equal` compares ids on difficult text each time a
tokenizer is first opened, and a test compares every assigned code point.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import tiktoken
from tokenizers import Tokenizer as HuggingFaceTokenizer

from dougong.core.errors import DataError
from dougong.data.bpe import BYTES, PATTERNS, byte_alphabet
from dougong.data.difficult import difficult_texts

_GROUP_CHARACTERS = 1 << 17
_UNICODE = 0x110000
_PROVEN_MOST = 8


class Encoder(Protocol):
    """One way from text to ids. `name` is what the facts call it."""

    name: str

    def encode(self, text: str) -> np.ndarray: ...

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]: ...


class HuggingFaceEncoder:
    """The reference: the `tokenizers` library, which uses all cores for a batch by itself."""

    name = "tokenizers"

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]


class TiktokenEncoder:
    """tiktoken with the same merges; `ranks` maps a token's bytes to its id."""

    name = "tiktoken"

    def __init__(self, pattern: str, ranks: dict[bytes, int], reference: HuggingFaceEncoder) -> None:
        self._encoding = tiktoken.Encoding(
            "dougong", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self._reference = reference

    def encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except ValueError:   # its regex engine gives up on about a million blanks in a row
            return self._reference.encode(text)

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """Threads do share the work: tiktoken lets go of the interpreter lock while it encodes."""
        if threads == 1 or len(texts) == 1:
            return [self.encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            groups = pool.map(lambda group: [self.encode(text) for text in group], _groups(texts))
            return [ids for group in groups for ids in group]


class BytesEncoder:
    """A token is a byte, its id the byte's value."""

    name = "numpy"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]


class CharactersEncoder:
    """A token is a character. One that is not in the vocabulary becomes its UTF-8 bytes, or is refused.

    `first_byte` is the id of byte 0 (the other 255 follow), or None to raise DataError.
    """

    name = "numpy"

    def __init__(self, characters: dict[str, int], first_byte: int | None) -> None:
        self._id_of = np.full(_UNICODE, -1, dtype=np.int32)
        for character, token in characters.items():
            self._id_of[ord(character)] = token
        self._first_byte = first_byte

    def encode(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._id_of[code_points]
        unknown = code_points[ids < 0]
        if not len(unknown):
            return ids
        if self._first_byte is None:
            named = ", ".join(f"{chr(c)!r} (U+{c:04X})" for c in np.unique(unknown)[:8])
            raise DataError(
                f"{len(unknown):,} characters are not in the vocabulary, which holds those of the training "
                f"split only: {named}.\nTry tokenizer.unknown=bytes, which spells such characters as bytes."
            )
        widths = 1 + (unknown > 0x7F).astype(np.int64) + (unknown > 0x7FF) + (unknown > 0xFFFF)
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[ids < 0] = widths
        ids = np.repeat(ids, repeats)
        spelled = "".join(map(chr, unknown.tolist())).encode()
        ids[ids < 0] = self._first_byte + np.frombuffer(spelled, dtype=np.uint8).astype(np.int32)
        return ids

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]


def choose_encoder(
    tokenizer: HuggingFaceTokenizer, texts: Iterable[str] = (), *, fast: bool = True
) -> Encoder:
    """The fastest encoder whose ids equal `tokenizer`'s on difficult text and on `texts`; the reference if
    not `fast`."""
    reference = HuggingFaceEncoder(tokenizer)
    candidate = _proven(tokenizer.to_str(), reference) if fast else None
    return candidate if candidate is not None and proven_equal(candidate, reference, list(texts)) else reference


_PROVEN: dict[str, Encoder | None] = {}


def _proven(description: str, reference: HuggingFaceEncoder) -> Encoder | None:
    """The fast encoder of a description that agrees on difficult text. Proven once, as one process opens the tokenizer
    of a run many times."""
    if description not in _PROVEN:
        fast = _fast_encoder(json.loads(description), reference)
        while len(_PROVEN) >= _PROVEN_MOST:
            del _PROVEN[next(iter(_PROVEN))]
        _PROVEN[description] = fast if fast is not None and proven_equal(fast, reference, difficult_texts()) else None
    return _PROVEN[description]


def proven_equal(fast: Encoder, reference: Encoder, texts: list[str]) -> bool:
    """Whether both give the same ids for every text that `fast` does not refuse."""
    for text in texts:
        try:
            ids = fast.encode(text)
        except DataError:
            continue
        if not np.array_equal(ids, reference.encode(text)):
            return False
    return True


def _fast_encoder(spec: dict[str, Any], reference: HuggingFaceEncoder) -> Encoder | None:
    """What the tokenizer's description allows; None where only the reference will do."""
    model = spec["model"]
    plain = (
        spec["normalizer"] is None
        and model["type"] == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(token["special"] for token in spec["added_tokens"])
    )  # others are cut out of the text first
    if not plain:
        return None
    vocabulary: dict[str, int] = dict(model["vocab"])
    specials = {token["content"] for token in spec["added_tokens"]}
    vocabulary = {token: index for token, index in vocabulary.items() if token not in specials}
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if spec["pre_tokenizer"] is None and not merges:
        return _characters(vocabulary, bool(model.get("byte_fallback")))
    if not merges and vocabulary == {stand_in: byte for byte, stand_in in enumerate(byte_alphabet())}:
        return BytesEncoder() if split_pattern(spec) == "" else None
    return _tiktoken(spec, vocabulary, merges, reference)


def _characters(vocabulary: dict[str, int], byte_fallback: bool) -> CharactersEncoder | None:
    spelled = [f"<0x{byte:02X}>" for byte in range(BYTES)]
    characters = {token: index for token, index in vocabulary.items() if len(token) == 1}
    if not byte_fallback:
        return CharactersEncoder(characters, None) if len(characters) == len(vocabulary) else None
    first = vocabulary.get(spelled[0])
    in_order = first is not None and all(
        vocabulary.get(name) == first + byte for byte, name in enumerate(spelled)
    )
    whole = len(characters) + BYTES == len(vocabulary)
    return CharactersEncoder(characters, first) if in_order and whole else None


def _tiktoken(spec: dict[str, Any], vocabulary: dict[str, int], merges: list, reference: HuggingFaceEncoder,
              ) -> TiktokenEncoder | None:
    pattern, byte_of = split_pattern(spec), {stand_in: byte for byte, stand_in in enumerate(byte_alphabet())}
    learned = [vocabulary.get(left + right, -1) for left, right in merges]
    ascending = all(a < b for a, b in pairwise(learned)) and (not learned or learned[0] >= 0)
    only_byte_characters = all(character in byte_of for token in vocabulary for character in token)
    complete = all(stand_in in vocabulary for stand_in in byte_of) and len(vocabulary) == BYTES + len(learned)
    if not (pattern and ascending and only_byte_characters and complete):
        return None
    ranks = {bytes(byte_of[character] for character in token): index for token, index in vocabulary.items()}
    return TiktokenEncoder(pattern, ranks, reference)


def split_pattern(spec: dict[str, Any]) -> str | None:
    """The splitting rule of a byte-level tokenizer's description; "" for none, None for anything else."""
    parts = spec["pre_tokenizer"] or {}
    parts = parts.get("pretokenizers", [parts])
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    if len(parts) == 1:
        return PATTERNS["gpt-2"] if parts[0].get("use_regex", True) else ""
    split = parts[0]
    plain = (len(parts) == 2 and split.get("type") == "Split" and split.get("behavior") == "Isolated"
             and not split.get("invert") and not parts[1].get("use_regex", True))
    return split["pattern"].get("Regex") if plain else None


def _groups(texts: list[str]) -> list[list[str]]:
    """Neighbouring texts together, so that a thread gets enough to do."""
    groups, size = [[]], 0
    for text in texts:
        if size > _GROUP_CHARACTERS:
            groups.append([])
            size = 0
        groups[-1].append(text)
        size += len(text)
    return groups
