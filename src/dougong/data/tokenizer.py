"""Tokenizers: byte-level BPE trained on your text, characters, bytes, or an existing one; one class over all.

Every tokenizer is a Hugging Face tokenizer directory on disk (`tokenizer.json`, `tokenizer_config.json`),
readable by transformers with the same ids. Text never turns into a special token: `<|endoftext|>` inside a
document is spelled out.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models

from dougong.core.config import config
from dougong.core.errors import ConfigError, DataError
from dougong.core.files import write_json, write_text
from dougong.data.bpe import (
    BYTES,
    DOCUMENT_TOKEN,
    PATTERNS,
    RESERVED,
    add_special_tokens,
    byte_alphabet,
    byte_level,
    special_names,
    train_bpe,
    training_sample,
)
from dougong.data.encoders import choose_encoder, split_pattern
from dougong.runtime.device import usable_cores

_PROOF_BYTES = 1 << 20      # of the training text, on which a fast encoder must agree with the reference
_SAMPLE_BYTES = 16 << 20
_SAMPLE_BYTES_PER_TOKEN = 8 << 10  
_ENCODER = "dougong_encoder"
_SPELLED_BYTES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(BYTES)}
_END_OF_TEXT = (DOCUMENT_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer:
    """Text to ids and back. Encoding adds no special tokens: `first_id` and `document_id` are the caller's to add.

    `document_id` ends every document, and begins it where the tokenizer has no other token for that; None when the
    data is one stream without borders.
    """

    def __init__(
        self,
        backend: HuggingFaceTokenizer,
        *,
        document_id: int | None,
        settings: dict[str, Any] | None = None,
        proof: Sequence[str] = (),
    ) -> None:
        backend.encode_special_tokens = True   # literal text that looks like a special token stays text
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.document_id = document_id
        self._settings = dict(settings or {})
        self._encoder = choose_encoder(backend, proof, fast=self._settings.get(_ENCODER) != "tokenizers")

    @property
    def settings(self) -> dict[str, Any]:
        """What tokenizer_config.json says besides the tokens."""
        return dict(self._settings)

    @cached_property
    def _spec(self) -> dict[str, Any]:
        return json.loads(self.backend.to_str())

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows an embedding needs."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def kind(self) -> str:
        """`bpe`, `characters`, `bytes`, or `file` for a tokenizer of another make."""
        if self._encoder.name == "numpy":
            return "characters" if self._spec["pre_tokenizer"] is None else "bytes"
        return "bpe" if self.pre_tokenizer is not None else "file"

    @cached_property
    def pre_tokenizer(self) -> str | None:
        """llama.cpp's name of the splitting rule (`qwen2`, …), None when it is not one of those."""
        pattern = split_pattern(self._spec)
        return next((name for name, known in PATTERNS.items() if known == pattern), None)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        return {token["content"]: token["id"] for token in self._spec["added_tokens"] if token["special"]}

    @property
    def begin_id(self) -> int | None:
        """What a text is read after: the tokenizer's own first token where it has one apart from the last (Llama), none
        where its settings name none and add none (Qwen), else `document_id`."""
        name = _content(self._settings.get("bos_token"))
        if name is None and self._settings.get("add_bos_token") is False:
            return None
        found = None if name is None else self.backend.token_to_id(name)
        return self.document_id if found is None else found

    @property
    def first_id(self) -> int | None:
        """What a document begins with where it is trained on and scored: `begin_id`, else `document_id`."""
        return self.document_id if self.begin_id is None else self.begin_id

    def ending_with(self, token: int | None) -> "Tokenizer":
        """The same tokenizer with this token as `document_id`; itself where there is no such token."""
        name = self.backend.id_to_token(token) if token is not None and 0 <= token < self.vocab_size else None
        if name is None:
            return self
        return Tokenizer(self.backend, document_id=token, settings={**self._settings, "eos_token": name})

    def with_chat_template(self, source: str, special_tokens: Sequence[str]) -> "Tokenizer":
        """The same tokenizer with a template for conversations. The special tokens that the template writes take the
        place of reserved ones, so that the vocabulary keeps its size; where none is left they are added at its end."""
        spec = json.loads(self.backend.to_str())
        held = {token["content"]: token for token in spec["added_tokens"]}
        free = [token for token in spec["added_tokens"] if token["content"].startswith(RESERVED)]
        for name in special_tokens:
            if name in held:
                held[name]["special"] = True
            elif free:
                free.pop(0)["content"] = name
        backend = HuggingFaceTokenizer.from_str(json.dumps(spec, ensure_ascii=False))
        add_special_tokens(backend, [name for name in special_tokens if backend.token_to_id(name) is None])
        return Tokenizer(backend, document_id=self.document_id, settings={**self._settings, "chat_template": source})

    @property
    def normalizes(self) -> bool:
        """Whether text is changed before it is cut, such as composed (NFC)."""
        return self._spec["normalizer"] is not None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns a conversation into text, where there is one."""
        template = self._settings.get("chat_template")
        if isinstance(template, list):      # transformers' form of several, by name
            template = next((one.get("template") for one in template
                             if isinstance(one, dict) and one.get("name") == "default"), None)
        return template if isinstance(template, str) and template else None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides ids."""
        own = [] if self.first_id == self.document_id else [self.first_id]
        text = json.dumps([self._spec, self.document_id, *own], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32. Raises DataError for a character that the vocabulary cannot spell."""
        return self._encoder.encode(text)

    def encode_batch(self, texts: list[str], *, threads: int | None = None) -> list[np.ndarray]:
        """Ids of each text, on `threads` threads (None: every core this process may use)."""
        return self._encoder.encode_batch(texts, threads or usable_cores()) if texts else []

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; special tokens vanish and bytes that are not UTF-8 become U+FFFD."""
        if self._bytes_of is None:
            return self.backend.decode([int(token) for token in ids], skip_special_tokens=True)
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The exact bytes of `ids`, special tokens left out.

        Exact for byte-level, byte and character tokenizers (`exact`); for others the bytes of `decode`.
        """
        if self._bytes_of is None:
            return self.decode(ids).encode()
        try:
            return b"".join([self._bytes_of[int(token)] for token in ids])
        except IndexError:
            raise DataError(f"token id {int(max(ids))} is not below vocab_size={self.vocab_size}.") from None

    @property
    def exact(self) -> bool:
        """Whether decoding what was encoded gives back the same bytes, whatever the text."""
        return self._bytes_of is not None and self._spec["normalizer"] is None

    @cached_property
    def _bytes_of(self) -> list[bytes] | None:
        """The bytes of each id; None where they depend on its neighbours (SentencePiece, WordPiece)."""
        byte_of = {stand_in: bytes([byte]) for byte, stand_in in enumerate(byte_alphabet())}
        table = [b""] * self.vocab_size
        added = {token["id"] for token in self._spec["added_tokens"]}
        characters = self._encoder.name == "numpy" and self._spec["pre_tokenizer"] is None
        if not characters and (self._spec["decoder"] or {}).get("type") != "ByteLevel":
            return None
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            if index in added:
                table[index] = b"" if token in self.special_tokens else token.encode()
            elif characters:
                table[index] = _SPELLED_BYTES.get(token) or token.encode()
            else:
                table[index] = b"".join(byte_of.get(character, character.encode()) for character in token)
        return table

    @cached_property
    def pieces(self) -> list[bytes]:
        """What each token adds to a text, in bytes; of special tokens it is their name. SentencePiece's ▁ is a blank,
        also where `decode` would leave it out: at the beginning of a text."""
        pieces = list(self._bytes_of or [b""] * self.vocab_size)
        if self._bytes_of is None:
            for token, index in self.backend.get_vocab(with_added_tokens=False).items():
                pieces[index] = _SPELLED_BYTES.get(token) or token.replace("▁", " ").encode()
        for token in self._spec["added_tokens"]:
            pieces[token["id"]] = token["content"].encode()
        return pieces

    def facts(self) -> dict[str, Any]:
        """What a reader of a report wants to know, as JSON values."""
        longest = sorted(
            (self.decode_bytes([index]) for index in range(self.vocab_size)), key=lambda b: (-len(b), b)
        )
        return {"kind": self.kind, "vocab_size": self.vocab_size, "pre_tokenizer": self.pre_tokenizer,
                "encoder": self._encoder.name, "exact": self.exact,
                "document_id": self.document_id, "special_tokens": self.special_tokens,
                "longest_tokens": [token.decode("utf-8", errors="replace") for token in longest[:10]],
                "fingerprint": self.fingerprint}

    def save(self, directory: Path | str) -> None:
        """Writes a Hugging Face tokenizer directory."""
        directory = Path(directory)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._settings,
        }
        if self._encoder.name == "tokenizers":
            settings[_ENCODER] = "tokenizers"  # one that failed on the training text is not tried again
        if self.document_id is not None:
            settings["eos_token"] = self.backend.id_to_token(self.document_id)
        write_text(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        write_json(directory / "tokenizer_config.json", settings)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Opens a tokenizer.json or a directory with one. Raises DataError saying what is there instead."""
        backend, settings = _read(Path(path))
        name = _content(settings.get("eos_token"))
        return cls(
            backend, document_id=None if name is None else backend.token_to_id(name), settings=settings
        )


@config
class BpeConfig:
    """Byte-level BPE trained on the training split; spells any text, in any language, exactly."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int | None = None
    """entries in all, special tokens included; derived: from the size dial"""
    pre_tokenizer: Literal["gpt-2", "qwen2", "llama-bpe"] = "qwen2"
    """how text is cut before merging; each is a rule that llama.cpp knows by this name"""
    reserved: int = 7
    """special tokens kept free for later use, such as the turns of a chat"""
    sample_bytes: int | None = None
    """most text to learn from, a seeded choice of documents; None: 8 KiB a token, at least 16 MiB"""

    def __post_init__(self) -> None:
        least = BYTES + 1 + self.reserved
        if self.reserved < 0 or (self.vocab_size is not None and self.vocab_size < least):
            raise ConfigError(
                f"tokenizer.vocab_size={self.vocab_size} cannot hold {BYTES} bytes, the document token and "
                f"{self.reserved} reserved tokens. Try tokenizer.vocab_size={max(least, 512)} or more."
            )
        if self.sample_bytes is not None and self.sample_bytes < 1:
            raise ConfigError(
                f"tokenizer.sample_bytes={self.sample_bytes} leaves nothing to learn from. Try 16000000."
            )

    def build(self, documents: Any, *, seed: int = 0) -> Tokenizer:
        """Trains on a DocumentView. Raises ConfigError when the text supports fewer tokens than asked for."""
        if self.vocab_size is None:
            raise ConfigError(
                "tokenizer.vocab_size is derived from a recipe's size. Without one, give it, such as 2048."
            )
        budget = self.sample_bytes or max(_SAMPLE_BYTES, _SAMPLE_BYTES_PER_TOKEN * self.vocab_size)
        backend = train_bpe(training_sample(documents, budget, seed), vocab_size=self.vocab_size,
                            pre_tokenizer=self.pre_tokenizer, reserved=self.reserved)
        proof = training_sample(documents, _PROOF_BYTES, seed)
        return Tokenizer(backend, document_id=backend.token_to_id(DOCUMENT_TOKEN), proof=list(proof))


@config
class CharactersConfig:
    """One token per character of the training split."""

    kind: Literal["characters"] = "characters"
    unknown: Literal["bytes", "refuse"] = "bytes"
    """a character outside the vocabulary is spelled by its UTF-8 bytes (256 more tokens), or refused"""
    separator: bool = True
    """mark where documents begin; off, tokens are exactly the characters of one stream"""

    def build(self, documents: Any, *, seed: int = 0) -> Tokenizer:
        """Collects the characters of every document of a DocumentView, sorted by code point."""
        counts: Counter[str] = Counter()
        for document in documents:
            counts.update(document.text)
        if not counts:
            raise DataError(
                "the training split holds no text, so there are no characters to make a vocabulary of."
            )
        names = sorted(counts)
        if self.unknown == "bytes":
            names += _SPELLED_BYTES
        vocabulary = {name: index for index, name in enumerate(names)}
        backend = HuggingFaceTokenizer(
            models.BPE(vocab=vocabulary, merges=[], byte_fallback=self.unknown == "bytes")
        )
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])  # type: ignore[assignment]
        return _with_separator(backend, self.separator)


@config
class BytesConfig:
    """One token per byte of UTF-8: 256, and the document token."""

    kind: Literal["bytes"] = "bytes"
    separator: bool = True
    """mark where documents begin; off, tokens are exactly the bytes of one stream"""

    def build(self, documents: Any = None, *, seed: int = 0) -> Tokenizer:
        backend = byte_level({stand_in: byte for byte, stand_in in enumerate(byte_alphabet())}, [], None)
        return _with_separator(backend, self.separator)


@config
class FileConfig:
    """An existing tokenizer: a tokenizer.json, or a directory (a model's, or a run's) that holds one."""

    kind: Literal["file"] = "file"
    path: str = ""
    """the file or directory"""
    document_token: str | None = None
    """derived: the tokenizer's own end-of-text token"""

    def build(self, documents: Any = None, *, seed: int = 0) -> Tokenizer:
        """Raises ConfigError when the tokenizer has no token that could separate documents."""
        if not self.path:
            raise ConfigError("tokenizer.kind=file needs tokenizer.path=FILE_OR_DIRECTORY.")
        backend, settings = _read(Path(self.path).expanduser())
        name = self.document_token or _content(settings.get("eos_token")) or next(
            (known for known in _END_OF_TEXT if backend.token_to_id(known) is not None), None)
        if name is None or backend.token_to_id(name) is None:
            specials = [token.content for token in backend.get_added_tokens_decoder().values()]
            raise ConfigError(
                f"the tokenizer in {self.path} has no token {name or 'that ends a text'!r}.\n"
                f"Name one with tokenizer.document_token=…; it has: {', '.join(specials[:12]) or 'none'}."
            )
        return Tokenizer(backend, document_id=backend.token_to_id(name), settings=settings)


def _with_separator(backend: HuggingFaceTokenizer, separator: bool) -> Tokenizer:
    if not separator:
        return Tokenizer(backend, document_id=None)
    add_special_tokens(backend, special_names(0))
    return Tokenizer(backend, document_id=backend.token_to_id(DOCUMENT_TOKEN))


def _read(path: Path) -> tuple[HuggingFaceTokenizer, dict[str, Any]]:
    """The tokenizer and the settings beside it (chat template included)."""
    directory = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        there = (
            ", ".join(sorted(p.name for p in directory.iterdir())[:10]) if directory.is_dir() else "nothing"
        )
        raise DataError(
            f"no tokenizer at {path}: a tokenizer.json is needed, there is {there or 'nothing'}.\n"
            "An older format can be turned into one with transformers: "
            "AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW)."
        )
    try:
        backend = HuggingFaceTokenizer.from_file(str(file))
    except Exception as error:   # the library raises bare Exception for a file it cannot read
        raise DataError(f"{file} is not a tokenizer.json that can be read: {error}") from None
    settings_file, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    try:
        settings = json.loads(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
        if not isinstance(settings, dict):
            raise ValueError(f"it should hold keys and values, and holds {type(settings).__name__}")
        if template.is_file():
            settings["chat_template"] = template.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{settings_file} is damaged: {error}. Fetch it again.") from None
    return backend, settings


def _content(token: Any) -> str | None:
    """A token as settings give it: a string, or a mapping with its `content`. Raises DataError for anything else."""
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and not isinstance(name, str):
        raise DataError(f"tokenizer_config.json names a token by {name!r}, which is no text. Fetch it again.")
    return name
