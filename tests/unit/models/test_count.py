"""Counts against published figures, transformers, hand calculation and real memory."""

import pytest
import torch

from dougong.models import FAMILIES, count
from dougong.nn.attention_kernels import explicit

GPT2 = FAMILIES["gpt2"](vocab_size=50257, context=1024, dim=768, num_layers=12, num_heads=12)
SMALL = {"vocab_size": 61, "context": 64, "dim": 48, "num_layers": 3, "num_heads": 4}


def test_gpt2_124m_by_hand():
    counted = count.parameters(GPT2)
    assert counted["total"] == 124_439_808, "the published model"
    assert counted["embedding"] == (50257 + 1024) * 768
    assert counted["matrices"] == 12 * 12 * 768**2 + 50257 * 768, "4 + 8 squares, the head"
    assert count.flops_per_token(GPT2, 1024) == 6 * counted["matrices"] + 6 * 12 * 1024 * 768
    assert counted["by_part"]["stack.attention"] == 12 * (4 * 768**2 + 4 * 768)


def test_published_models_have_their_published_size():
    pytest.importorskip("transformers")
    from dougong.interop.maps import MAPS

    # Qwen3-0.6B's config.json; the model card says 0.6B, of them 0.44B without embeddings.
    config = MAPS["qwen3"].config_from_hf({
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28,
        "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960, "rope_theta": 1000000})
    counted = count.parameters(config)
    assert round(counted["total"] / 1e9, 1) == 0.6
    assert round((counted["total"] - counted["embedding"]) / 1e9, 2) == 0.44


def test_a_window_reads_fewer_keys():
    full = FAMILIES["nano"](**SMALL)
    short = FAMILIES["nano"](**SMALL, window=16, window_pattern="SSL")
    wide = FAMILIES["nano"](**SMALL, window=64, window_pattern="SSL")
    matrices = count.parameters(full)["matrices"]
    assert count.flops_per_token(full, 64) == 6 * matrices + 12 * 48 * 3 * 32
    assert count.flops_per_token(short, 64) == 6 * matrices + 12 * 48 * (32 + 2 * (16 - 16**2 / 128))
    assert count.flops_per_token(wide, 64) == count.flops_per_token(full, 64)
    # The mean of min(t + 1, W) over a row, counted out, is half a key more: the query's own.
    assert sum(min(t + 1, 16) for t in range(64)) / 64 == pytest.approx(16 - 16**2 / 128, abs=0.5)


def test_other_models_have_parameters_and_no_tokens():
    linear = FAMILIES["linear"](in_features=7, bias=True)
    assert count.parameters(linear) == {"total": 8, "embedding": 0, "matrices": 7, "by_part": {"linear": 8}}
    assert count.flops_per_token(linear, 1) is None


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "nano"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_bytes_are_what_a_real_forward_keeps(kind, dtype):
    config = FAMILIES[kind](**SMALL)
    model = config.build()
    model.initialise(0)
    model.compute_dtype = dtype
    for block in model.stack.values():
        block.attention.kernel = explicit
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(torch.randint(0, 61, (2, 64)))
    assert torch.isfinite(hidden).all()
    real = sum(storage.nbytes() for storage in kept.values())
    planned = count.activation_bytes(config, rows=2, context=64, dtype=dtype, fused_attention=False)
    # RoPE's real table is longer than needed by rounding up; on the meta device everything else is the same.
    assert planned == pytest.approx(real, rel=0.02)


def test_selective_checkpointing_keeps_the_products_of_each_layer():
    """Counted by hand: queries and what attention returns, keys, values, the two matrices that write to the stream, the
    feed-forward's other two, and the scores."""
    config = FAMILIES["qwen3"](**(SMALL | {"num_layers": 8}))
    none, selective, full = (count.activation_bytes(config, rows=2, context=64, checkpoint_activations=mode,
                                                    fused_attention=False) for mode in ("none", "selective", "full"))
    section, tokens = config.decoder(), 2 * 64
    N, K, H = section.attention.heads(section.dim)
    products = tokens * (2 * N * H + 2 * K * H + 2 * section.dim + 2 * section.feed_forward.width(section.dim) + N * 64)
    assert selective - full == 8 * 4 * products
    assert full < selective < none


def test_fused_attention_and_checkpointing_keep_less():
    config = FAMILIES["qwen3"](**(SMALL | {"num_layers": 8}))
    plain, fused, again = (
        count.activation_bytes(config, rows=2, context=64, fused_attention=False),
        count.activation_bytes(config, rows=2, context=64),
        count.activation_bytes(config, rows=2, context=64, checkpoint_activations="full"))
    assert again < fused / 3 and fused < plain
    assert count.activation_bytes(config, rows=4, context=64) == pytest.approx(2 * fused, rel=0.02)
