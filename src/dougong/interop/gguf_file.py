"""Writing and reading GGUF files with the `gguf` package, and the `Modelfile` with which Ollama takes one in."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dougong.core.errors import CheckpointError, ConfigError, MissingExtraError
from dougong.core.files import write_text
from dougong.data.chat_template import ChatTemplate
from dougong.data.tokenizer import Tokenizer
from dougong.data.turns import CHATML, FIRST, TURN_TOKENS
from dougong.interop.gguf_form import GGUFForm
from dougong.nn.quantized import Quantized

QUANTS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
BLOCK = 32
"""values that share a scale in the q formats"""
_FULL_PRECISION = ("_norm.", "position_embd.", "ffn_gate_inp.")
"""what llama.cpp keeps in float32 whatever the file's type; so it does with everything of one dimension"""
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp holds it: byte-level BPE in GPT-2's spelling, cut by a rule that it knows by name."""

    pre_tokenizer: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    begin: int | None
    add_begin: bool
    """whether every text and conversation that the model was trained on followed `begin`"""
    end: int | None
    chat_template: str | None


def vocabulary(tokenizer: Tokenizer, rows: int) -> Vocabulary:
    """`rows` is the embedding's: those without a token get unused ones. Raises ConfigError for a tokenizer that
    llama.cpp would read otherwise."""
    import json

    spec = json.loads(tokenizer.backend.to_str())
    why = {"bytes": "it has no merges, and llama.cpp refuses a vocabulary without any",
           "characters": "llama.cpp has no tokenizer of characters"}.get(tokenizer.kind)
    if why is None and tokenizer.pre_tokenizer is None:
        why = "it cuts text by a rule that llama.cpp has no name for here (gpt-2, qwen2 and llama-bpe are known)"
    if why is not None:
        raise ConfigError(f"a tokenizer of kind {tokenizer.kind} has no place in a GGUF file: {why}.\n"
                          "Train with tokenizer=bpe, or export with --to hf.")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [_UNUSED] * rows
    for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        tokens[index], types[index] = token, _NORMAL
    for added in spec["added_tokens"]:
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    return Vocabulary(tokenizer.pre_tokenizer or "", tokens, types, merges, tokenizer.begin_id,
                      _begins(tokenizer), tokenizer.document_id, tokenizer.chat_template)


def _begins(tokenizer: Tokenizer) -> bool:
    if not tokenizer.chat_template:
        return tokenizer.begin_id is not None
    return ChatTemplate(tokenizer).encode([{"role": "user", "content": "a"}])[:1] == [tokenizer.begin_id]


def write_gguf(path: Path, form: GGUFForm, state: Mapping[str, Tensor], words: Vocabulary, *, quant: str, name: str,
               license: str = "unknown", integers: Mapping[str, Quantized] | None = None) -> dict[str, str]:
    """Writes the file and syncs it; returns the type of each tensor. Rows that blocks of 32 do not divide are kept in
    f16. Weights that are `integers` already and of the form of `quant` are written as they are, not rounded again."""
    gguf = gguf_package()
    if quant not in QUANTS:
        raise ConfigError(f"quant={quant!r} is not known. Known: {', '.join(QUANTS)}.\nK-quants (q4_k_m, …) are "
                          "made from an f32 file by llama.cpp's own llama-quantize.")
    writer = gguf.GGUFWriter(str(path), form.architecture)
    writer.add_name(name)
    if license != "unknown":
        writer.add_license(license)
    for key, value in form.keys.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{form.architecture}.{key}", value)
    writer.add_file_type(_file_type(gguf, quant))
    if quant.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, words)
    types = {}
    ready = _blocks(form, integers or {}, quant)
    for key, tensor in form.stored(state).items():
        if key in ready:
            writer.add_tensor(key, ready[key], raw_dtype=gguf.GGMLQuantizationType[quant.upper()])
            types[key] = quant
            continue
        values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        kind = gguf.GGMLQuantizationType[_type_of(key, values.shape, quant).upper()]
        with np.errstate(over="ignore"):
            data = gguf.quants.quantize(values, kind)
        if kind.name == "F16" and not np.isfinite(data).all():
            raise ConfigError(f"{key} holds {np.abs(values).max():.3g}, beyond the range of f16 (65504). Try "
                              "--quant bf16.")
        writer.add_tensor(key, data, raw_dtype=kind)
        types[key] = kind.name.lower()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return types


def _blocks(form: GGUFForm, integers: Mapping[str, Quantized], quant: str) -> dict[str, np.ndarray]:
    """Stored name -> blocks of q8_0 or q4_0, of tensors whose parts all hold such integers: the float16 scale, then 32
    int8, or 16 bytes with the first 16 integers (plus 8) in the low halves and the last 16 in the high ones."""
    bits = {"q8_0": 8, "q4_0": 4}.get(quant)
    fit = {name for name, part in integers.items()
           if part.bits == bits and part.group == BLOCK and part.shape[1] % BLOCK == 0}
    whole = GGUFForm(form.architecture, form.keys,
                     {key: ours for key, ours in form.tensors.items() if fit.issuperset(ours)}, form.permuted)
    values = whole.stored({name: integers[name].integers.cpu() for name in fit})
    scales = whole.stored({name: integers[name].scale.cpu() for name in fit})
    found = {}
    for key, tensor in values.items():
        blocks = tensor.numpy().reshape(-1, BLOCK)
        if bits == 4:
            low, high = np.split((blocks + 8).astype(np.uint8), 2, axis=1)
            blocks = low | (high << 4)
        scale = scales[key].numpy().reshape(-1, 1).view(np.uint8)
        found[key] = np.concatenate([scale, blocks.view(np.uint8)], axis=1).reshape(len(tensor), -1)
    return found


def _type_of(name: str, shape: tuple[int, ...], quant: str) -> str:
    if len(shape) < 2 or any(part in name for part in _FULL_PRECISION):
        return "f32"
    return "f16" if quant.startswith("q") and shape[-1] % BLOCK else quant


def _file_type(gguf: Any, quant: str) -> int:
    return int(gguf.LlamaFileType["ALL_F32" if quant == "f32" else f"MOSTLY_{quant.upper()}"])


def _add_vocabulary(writer: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre_tokenizer)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    if words.begin is not None:
        writer.add_bos_token_id(words.begin)
    if words.end is not None:
        writer.add_eos_token_id(words.end)
    writer.add_add_bos_token(words.add_begin)
    writer.add_add_eos_token(False)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and tensors as the package reads them (name, tensor_type, shape, data). Raises CheckpointError for a
    damaged file."""
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OSError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is no whole GGUF file: {str(error) or type(error).__name__}. Fetch or export it "
                              "again.") from None
    size = path.stat().st_size
    for tensor in reader.tensors:
        if int(tensor.data_offset) + int(tensor.n_bytes) > size:
            raise CheckpointError(f"{path} is cut off: {tensor.name} ends at byte "
                                  f"{int(tensor.data_offset) + int(tensor.n_bytes):,} of {size:,}. Export it again.")
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def dequantized(tensor: Any) -> Tensor:
    """A tensor of a file in float32."""
    gguf = gguf_package()
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


_OLLAMA_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
"""`data.turns.CHATML` without tools, in Go's template language as Ollama's documentation describes it"""


def write_modelfile(path: Path, model: str, *, context: int, words: Vocabulary) -> None:
    """What `ollama create NAME -f Modelfile` reads. Ollama adds the first token by itself."""
    end = [] if words.end is None else [f'PARAMETER stop "{words.tokens[words.end]}"']
    chat = ["# Ollama finds the chat template in the GGUF file if it knows it; else write one in Go's language here."]
    if words.chat_template and TURN_TOKENS[1] in words.chat_template:
        end.append(f'PARAMETER stop "{TURN_TOKENS[1]}"')
    if (words.chat_template or "").removeprefix(FIRST) == CHATML:
        chat = [f'TEMPLATE """{_OLLAMA_CHATML}"""']
    if not words.chat_template:
        chat = ["# The model continues text; there are no turns.", 'TEMPLATE """{{ .Prompt }}"""']
    write_text(path, "\n".join([f"FROM ./{model}", f"PARAMETER num_ctx {context}", *end, *chat]) + "\n")


def gguf_package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "Reading and writing GGUF files") from None
    return gguf
