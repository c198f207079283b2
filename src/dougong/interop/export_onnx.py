"""A directory for onnxruntime: the graph with its weights, and beside it what Hugging Face's readers of ONNX look for.

`SHA256SUMS` closes it (`sha256sum -c SHA256SUMS`), since neither graph nor weights show that something was changed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dougong.core.errors import ConfigError, MissingExtraError
from dougong.core.files import sha256, write_text
from dougong.data.tokenizer import Tokenizer
from dougong.interop.export_hf import (
    DTYPES,
    context_of,
    rounded,
    special_ids,
    with_weights,
    without_special_tokens,
    write_beside,
)
from dougong.interop.onnx_file import CHECKSUMS, MODEL
from dougong.interop.onnx_graph import ONE_FILE_BYTES, cache_names, write_onnx
from dougong.interop.published import published_form
from dougong.interop.verify import UNUSUAL, Mismatch, Verified, compare_ids, compare_logits, readable, rows_of
from dougong.train.shadow import tracked

READER = "onnxruntime"
PADDING = 3
"""columns before the row whose logits a left-padded batch is compared on"""


def write_onnx_directory(directory: Path, model: nn.Module, tokenizer: Tokenizer, *, dtype: str = "f32", card: str = "",
                         about: Mapping[str, str], one_file_bytes: int = ONE_FILE_BYTES) -> None:
    """Writes everything into an existing directory. Raises ConfigError for values that the type cannot hold and for a
    model that is no decoder."""
    copy = with_weights(model, rounded(tracked(model), dtype))
    write_onnx(directory, copy, dtype=DTYPES[dtype], about=about, one_file_bytes=one_file_bytes)
    write_beside(directory, settings(model.config), tokenizer, dtype=dtype, context=context_of(model), card=card)
    files = [path for path in sorted(directory.iterdir()) if path.name != "README.md"]    # a card may be edited
    write_text(directory / CHECKSUMS, "".join(f"{sha256(path)}  {path.name}\n" for path in files))


def settings(config: Any) -> dict[str, Any]:
    """config.json: that of the published family, or, for what no family has a place for, sizes under the same names.
    The graph holds the computation, so readers need no more of it."""
    try:
        family, published = published_form(config)
        return family.config_to_hf(published)
    except ConfigError:
        section = config.decoder()
    num_heads, num_kv_heads, head_dim = section.attention.heads(section.dim)
    return {"model_type": config.kind, "architectures": [], "vocab_size": section.vocab_size,
            "max_position_embeddings": section.context, "hidden_size": section.dim,
            "num_hidden_layers": section.num_layers, "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads, "head_dim": head_dim, "tie_word_embeddings": section.tied}


def verify_onnx(directory: Path, model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], *,
                dtype: str) -> Verified:
    """Loads the directory with onnxruntime and tokenizers, and compares token ids, and logits of whole texts, of a text
    read piece by piece through the cache, and of a left-padded batch.

    `model` is the run's. Raises Mismatch naming the reading, the row and the position; MissingExtraError without
    onnxruntime.
    """
    from tokenizers import Tokenizer as Backend

    texts = without_special_tokens([*texts, *UNUSUAL], tokenizer)
    with readable("tokenizers"):
        theirs = Backend.from_file(str(directory / "tokenizer.json"))
    compare_ids(texts, tokenizer.encode, lambda text: theirs.encode(text, add_special_tokens=False).ids, "tokenizers")
    if not special_ids(tokenizer).items() <= json.loads((directory / "generation_config.json").read_bytes()).items():
        raise Mismatch("generation_config.json names other tokens than the run's to begin and end a text.")
    ours = with_weights(model, rounded(tracked(model), dtype))
    rows = rows_of(tokenizer.encode_batch(list(texts), threads=1), first=tokenizer.begin_id, context=context_of(ours))
    with readable(READER):
        session = Session(directory / MODEL, cache_names(ours))  # type: ignore[arg-type]
    shorter = [row[:context_of(ours) - PADDING] or row[:1] for row in rows[:6]]
    found = [compare_logits(ours, _raising(reading), some, f"{READER} ({name})", texts=len(texts))
             for name, reading, some in (("whole texts", session.whole, rows),
                                         ("through the cache", session.stepwise, rows[:6]),
                                         ("a left-padded batch", session.padded, shorter))]
    worst = max(found, key=lambda one: one.largest_difference)
    return replace(worst, reader=f"{READER} (whole texts, through the cache, in left-padded batches)",
                   tokens=sum(one.tokens for one in found), tipped=sum(one.tipped for one in found),
                   tipped_difference=max(one.tipped_difference for one in found))


def _raising(reading: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def read(tokens: Tensor) -> Tensor:
        with readable(READER):
            return reading(tokens)
    return read


class Session:
    """A model in onnxruntime, read in three ways. Each takes tokens (1, T) and gives logits (1, T, V)."""

    def __init__(self, path: Path, cache: Sequence[str]) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "onnx", "Reading the export back (or --no-verify)") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        self._empty = {name: (shapes[name][1], shapes[name][3]) for name in cache}
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in cache)]

    def whole(self, tokens: Tensor) -> Tensor:
        """All tokens in one call."""
        return self._read(tokens, torch.ones_like(tokens), [tokens.shape[1]])

    def stepwise(self, tokens: Tensor) -> Tensor:
        """Half of them at once, three, and then one by one."""
        half, T = (tokens.shape[1] + 1) // 2, tokens.shape[1]
        middle = min(3, T - half)
        return self._read(tokens, torch.ones_like(tokens), [half, middle, *[1] * (T - half - middle)])

    def padded(self, tokens: Tensor) -> Tensor:
        """After columns of padding, below a row that begins at once; half of them at once, and the rest."""
        pad, T = PADDING, tokens.shape[1]
        other = tokens.flip(1).repeat(1, 1 + pad)[:, :T + pad]
        batch = torch.cat([other, torch.cat([tokens.new_zeros(1, pad), tokens], 1)])
        mask = torch.ones_like(batch)
        mask[1, :pad] = 0
        half = (T + pad + 1) // 2
        return self._read(batch, mask, [half, T + pad - half])[1:, pad:]

    def _read(self, tokens: Tensor, mask: Tensor, pieces: Sequence[int]) -> Tensor:
        position = (mask.cumsum(1) - 1).clamp(min=0)
        past = {name: np.zeros((len(tokens), K, 0, H), np.float32) for name, (K, H) in self._empty.items()}
        found, at = [], 0
        for piece in filter(None, pieces):
            end = at + piece
            logits, *present = self._session.run(self._outputs, {
                "input_ids": tokens[:, at:end].numpy(), "attention_mask": mask[:, :end].numpy(),
                "position_ids": position[:, at:end].numpy(), **past})
            past, at = dict(zip(past, present)), end
            found.append(torch.from_numpy(logits))
        return torch.cat(found, 1)
