"""Is a GGUF file the model? Its tensors within what each type may round, its tokens, and transformers' own reading."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from dougong.core.errors import MissingExtraError
from dougong.data.bpe import PATTERNS, byte_level
from dougong.data.tokenizer import Tokenizer
from dougong.interop.export_hf import context_of, transformers_package, with_weights, without_special_tokens
from dougong.interop.gguf_file import BLOCK, dequantized, read_gguf
from dougong.interop.gguf_form import GGUFForm
from dougong.interop.verify import UNUSUAL, Mismatch, Verified, compare_ids, compare_logits, readable, rows_of
from dougong.train.shadow import tracked

_LEVELS = {"q8_0": 127, "q5_0": 16, "q4_0": 8, "q5_1": 31, "q4_1": 15}
_HALF, _BRAIN = 2.0**-11, 2.0**-8
"""largest relative rounding of float16 and bfloat16"""
_UNREAD = {"qwen3": ("head_dim",), "gpt2": ("n_positions", "n_inner", "tie_word_embeddings", "vocab_size"),
           "llama": ("tie_word_embeddings", "attention_bias", "mlp_bias"), "qwen3_moe": ("moe_intermediate_size",)}
"""settings that transformers' reader takes no notice of, though the file has them; they are given to it"""


def verify_gguf(path: Path, form: GGUFForm, model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str],
                hf_config: Mapping[str, Any]) -> tuple[Verified, float]:
    """Returns what was compared, and the mean Kullback-Leibler divergence (nats per token) that rounding costs.

    Raises Mismatch naming the tensor, text or position that first differs; MissingExtraError without transformers.
    """
    fields, stored = read_gguf(path)
    _compare_keys(fields, form, tokenizer)
    held = {name: dequantized(tensor) for name, tensor in stored.items()}
    _compare_tensors({name: tensor.tensor_type.name.lower() for name, tensor in stored.items()}, held,
                     form.stored(tracked(model)))
    texts = without_special_tokens([*texts, *UNUSUAL], tokenizer)
    rebuilt = _tokenizer_of(fields)
    compare_ids(texts, tokenizer.encode, lambda text: rebuilt.encode(text, add_special_tokens=False).ids, "GGUF")
    ours = with_weights(model, form.restored(held))
    rows = rows_of(tokenizer.encode_batch(list(texts), threads=1), first=tokenizer.begin_id,
                   context=context_of(ours))
    found = compare_logits(ours, _theirs(path, hf_config), rows, "transformers (GGUF)", texts=len(texts))
    return found, _divergence(with_weights(model, tracked(model)), ours, rows)


def _compare_keys(fields: Mapping[str, Any], form: GGUFForm, tokenizer: Tokenizer) -> None:
    wanted = {f"{form.architecture}.{key}": value for key, value in form.keys.items()} | {
        "general.architecture": form.architecture, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.eos_token_id": tokenizer.document_id, "tokenizer.ggml.bos_token_id": tokenizer.begin_id,
        "tokenizer.chat_template": tokenizer.chat_template}
    for key, value in wanted.items():
        found = fields.get(key)
        same = abs(found - value) <= 1e-6 * abs(value) if isinstance(value, float) and found is not None else \
            found == value
        if not same:
            raise Mismatch(f"the GGUF file has {key}={found!r}, the run {value!r}.")


def _compare_tensors(types: Mapping[str, str], held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        truth = tensor.detach().float().cpu()
        if name not in held or held[name].shape != truth.shape:
            raise Mismatch(f"the GGUF file has {name} of shape {tuple(held[name].shape) if name in held else 'none'}, "
                           f"the run {tuple(truth.shape)}.")
        apart = (held[name] - truth).abs()
        if not bool((apart <= _bound(truth, types[name])).all()):
            raise Mismatch(f"the GGUF file holds other values in {name} ({types[name]}): up to "
                           f"{apart.max().item():.3g} apart, beyond what this type rounds.")


def _bound(values: Tensor, kind: str) -> Tensor:
    """How far a value may lie from its stored form. A block shares a scale (a float16): half a step, or a whole one at
    the end that the signed types cannot reach."""
    tiny = 1e-7     # float16's smallest step
    if kind in ("f32", "f16", "bf16"):
        return values.abs() * {"f32": 0.0, "f16": _HALF, "bf16": _BRAIN}[kind] + (tiny if kind == "f16" else 0.0)
    blocks = values.reshape(-1, BLOCK)
    largest, spread = blocks.abs().amax(1, keepdim=True), blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)
    step = {"q8_0": largest, "q5_0": 2 * largest, "q4_0": 2 * largest}.get(kind, spread) / _LEVELS[kind]
    # the scale is rounded too, and multiplied by up to the largest level; _1 types add a rounded minimum
    scale = 1.05 * _HALF * (largest + spread if kind.endswith("_1") else largest)
    return (step / 2 + scale + tiny * _LEVELS[kind]).expand_as(blocks).reshape(values.shape)


def _tokenizer_of(fields: Mapping[str, Any]) -> Any:
    """The tokenizer that the file describes, built from nothing else."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    words = {token: index for index, (token, kind) in enumerate(zip(tokens, types)) if kind == 1}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    rebuilt = byte_level(words, merges, PATTERNS[fields["tokenizer.ggml.pre"]])
    rebuilt.add_tokens([AddedToken(token, special=kind == 3, normalized=False)    # in their order: ids count on
                        for token, kind in zip(tokens, types) if kind in (3, 4)])
    rebuilt.encode_special_tokens = True
    return rebuilt


def _theirs(path: Path, hf_config: Mapping[str, Any]) -> Any:
    transformers = transformers_package()
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("accelerate", "gguf", "Reading a GGUF file back with transformers (or --no-verify)")
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if config.model_type != hf_config["model_type"]:
        raise Mismatch(f"transformers takes the GGUF file for {config.model_type}, the run is "
                       f"{hf_config['model_type']}.")
    for key in _UNREAD[config.model_type]:
        setattr(config, key, hf_config[key])
    with readable("transformers"):
        return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config,
                                                                 dtype=torch.float32).eval()


def _divergence(exact: nn.Module, other: nn.Module, rows: Sequence[Sequence[int]]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            tokens = torch.tensor([list(row)])
            truth, found = (torch.log_softmax(m(tokens).double(), -1) for m in (exact, other))
            total += (truth.exp() * (truth - found)).sum().item()
            count += len(row)
    return total / count
