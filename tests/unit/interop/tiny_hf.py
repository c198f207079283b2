"""Tiny models with tokenizers as Hugging Face directories, made by transformers, which knows nothing of us."""

from pathlib import Path

import torch
import transformers

from dougong.data.documents import Document
from dougong.data.tokenizer import BpeConfig, Tokenizer

SHAPE = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 64}
SHAPES = {
    "gpt2": {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96},
    "llama": SHAPE | {"tie_word_embeddings": False},
    "qwen3": SHAPE | {"tie_word_embeddings": True},
    "qwen3_moe": SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                          "norm_topk_prob": True},
}
TEXT = "The quick brown fox jumps over the lazy dog; 你好，世界！ def f(x): return x + 1\n"
TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<a>{% endif %}")


class _Documents(list):
    @property
    def bytes(self) -> int:
        return sum(len(document.text.encode()) for document in self)


def tokenizer(pre_tokenizer: str = "qwen2", vocab_size: int = 300) -> Tokenizer:
    documents = _Documents(Document(str(i), "tests", TEXT * (i + 1)) for i in range(4))
    return BpeConfig(vocab_size=vocab_size, pre_tokenizer=pre_tokenizer).build(documents)


def model(kind: str, seed: int = 0, **changes):
    """Random weights, large enough that every norm, bias and position matters."""
    config = transformers.AutoConfig.for_model(kind, **SHAPES[kind], **changes)
    made = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 and name.endswith("weight") else 0.15 * noise)
    return made


def write(directory: Path, kind: str, *, dtype=torch.float32, shard="1GB", pre_tokenizer="qwen2", **changes) -> Path:
    """The model as transformers itself saves it, and the tokenizer beside it."""
    text = tokenizer(pre_tokenizer)
    end = text.document_id
    model(kind, **{"bos_token_id": end, "eos_token_id": end, **changes}).to(dtype).save_pretrained(
        directory, max_shard_size=shard)
    text.save(directory)
    return directory
