"""Byte-level BPE trained on the user's own text (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2).

Training is Hugging Face `tokenizers`'; this file decides what it is fed, how ids are laid out, and which
splitting rule it gets: only rules that llama.cpp knows by name, so that an exported model needs no custom
code.

Ids: 256 byte tokens, then merges in the order in which they were learned, then the special tokens. Because
ids ascend with merge rank, tiktoken (which reads ranks from ids) yields the same ids; see encoders.py.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from dougong.core.errors import ConfigError, DataError
from dougong.runtime.seeds import derive

# Each rule cuts text into the pieces inside which merges happen. Public facts of the named tokenizers.
PATTERNS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
DOCUMENT_TOKEN = "<|endoftext|>"
RESERVED = "<|reserved_"
"""how the names of special tokens begin that have no meaning yet"""
BYTES = 256
_LEAST_PAIRS = 2          # a merge must occur at least twice: a token seen once teaches nothing
_CHUNK_CHARACTERS = 1 << 16
_SLICES = 16


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, by byte value (GPT-2's
    table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = iter(range(256, 512))
    return [chr(byte) if byte in set(printable) else chr(next(stand_in)) for byte in range(256)]


def byte_level(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], pattern: str | None
) -> HuggingFaceTokenizer:
    """An untrained or merge-free byte-level tokenizer that cuts by `pattern` (None: not at all)."""
    tokenizer = HuggingFaceTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = to_bytes if pattern is None else pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def add_special_tokens(tokenizer: HuggingFaceTokenizer, names: list[str]) -> None:
    """Appends special tokens after the last id, verbatim (never stripped or normalised)."""
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])


def special_names(reserved: int) -> list[str]:
    return [DOCUMENT_TOKEN, *(f"{RESERVED}{number}|>" for number in range(reserved))]


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, pre_tokenizer: str, reserved: int
) -> HuggingFaceTokenizer:
    """Learns merges until the vocabulary, special tokens included, has `vocab_size` entries.

    Raises ConfigError with the largest size the text supports when repeated pairs run out first.
    """
    specials = special_names(reserved)
    tokenizer = byte_level({}, [], PATTERNS[pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        min_frequency=_LEAST_PAIRS,
        special_tokens=[],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_chunks(texts), trainer)
    add_special_tokens(tokenizer, specials)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size={vocab_size:,} is more than the training text supports: pairs that occur "
            f"at least {_LEAST_PAIRS} times run out at {reached:,}.\n"
            f"Try tokenizer.vocab_size={reached} or less (an eighth of it learns better), or more text."
        )
    return tokenizer


def training_sample(documents: Any, budget_bytes: int, seed: int) -> Iterator[str]:
    """Texts of a DocumentView: all of them, or a seeded choice of about `budget_bytes` when there is more.

    Of a document larger than what is left of the budget, evenly spaced slices are taken.
    Raises DataError when there is no text at all.
    """
    if not documents.bytes:
        raise DataError("the training split holds no text, so there is nothing to learn a tokenizer from.")
    if documents.bytes <= budget_bytes:
        for document in documents:
            yield document.text
        return
    left = budget_bytes
    for index in np.random.default_rng(derive(seed, "tokenizer sample")).permutation(len(documents)):
        text = documents[int(index)].text
        size = len(text.encode())
        if size > left:
            share = len(text) * left // (size * _SLICES)
            step = max(1, -(-len(text) // _SLICES))
            yield from (text[start:start + share] for start in range(0, len(text), step) if share)
            return
        yield text
        left -= size


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Long texts cut after a line end: the trainer counts pieces in parallel, one text to a thread."""
    for text in texts:
        start = 0
        while len(text) - start > _CHUNK_CHARACTERS:
            stop = text.rfind("\n", start, start + _CHUNK_CHARACTERS) + 1 or start + _CHUNK_CHARACTERS
            yield text[start:stop]
            start = stop
        yield text[start:]
