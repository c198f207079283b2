"""Layouts that share each matrix product, with the stream whole or in parts along the tokens."""

import pytest
import torch
from matrix import CPU, Case, check, decoder, divided, reference
from processes import run_processes

from dougong.core.config import replace
from dougong.nn.attention import AttentionConfig
from dougong.nn.feed_forward import GELUConfig
from dougong.nn.norm import LayerNormConfig
from dougong.nn.position import ALiBiConfig, LearnedConfig
from dougong.nn.residual import X0ResidualConfig
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.parallel.tensor import divide_matrices, why_not_tensor
from dougong.runtime.device import Runtime
from dougong.runtime.layout import LayoutConfig

QWEN = Case(packed=True, micro_batches=2, objective=CausalLMConfig(z_loss=1e-2, label_smoothing=0.1),
            model=decoder(soft_cap=8.0))
GPT = Case(checkpoint_activations="full", model=decoder(
    tied=False, position=LearnedConfig(), feed_forward=GELUConfig(ffn_dim=64), norm=LayerNormConfig(),
    attention=AttentionConfig(num_heads=4, bias=True, output_bias=True), embedding_norm=True))
NANO = Case(model=decoder(
    position=ALiBiConfig(), value_embeddings="all", residual=X0ResidualConfig(), norm_placement="post",
    attention=AttentionConfig(num_heads=4, num_kv_heads=1, qk_norm="learned", bias=True)))


@pytest.mark.parametrize(("case", "layout"), [
    (QWEN, LayoutConfig(tensor=2)),
    (QWEN, LayoutConfig(tensor=2, sequence_parallel=False)),
    (QWEN, LayoutConfig(tensor=4, vocabulary_parallel=False)),
    (GPT, LayoutConfig(tensor=2)),
    (GPT, LayoutConfig(tensor=2, sequence_parallel=False, vocabulary_parallel=False)),
    (NANO, LayoutConfig(tensor=2)),
    (NANO, LayoutConfig(tensor=4, sequence_parallel=False)),
    (replace(QWEN, compiled=True, steps=1), LayoutConfig(shard=2, tensor=2)),
    (replace(QWEN, compiled=True, steps=1, checkpoint_activations="selective"), LayoutConfig(tensor=2)),
    (replace(QWEN, compiled=True, steps=1, checkpoint_activations="full"), LayoutConfig(tensor=2)),
    (replace(GPT, rows=4), LayoutConfig(shard=2, tensor=2, vocabulary_parallel=False)),
    (QWEN, LayoutConfig(replicate=2, tensor=2)),
    (NANO, LayoutConfig(replicate=2, shard=2, tensor=2)),
], ids=lambda value: str(value) if isinstance(value, LayoutConfig) else "")
def test_products_shared(case, layout):
    check(reference(case), run_processes(layout.processes, divided, case, layout))


@pytest.mark.parametrize(("model", "layout", "reason"), [
    (decoder(), LayoutConfig(tensor=3), "does not divide num_heads=4"),
    (decoder(attention=AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=8)), LayoutConfig(tensor=2),
     "num_kv_heads=3"),
    (decoder(feed_forward=GELUConfig(ffn_dim=63)), LayoutConfig(tensor=2), "ffn_dim=63"),
    (decoder(vocab_size=97), LayoutConfig(tensor=2), "vocabulary_parallel=false"),
    (decoder(context=15), LayoutConfig(tensor=2), "sequence_parallel=false"),
    (decoder(dropout=0.1), LayoutConfig(tensor=2, sequence_parallel=False), "sequence_parallel=true"),
])
def test_what_cannot_be_shared_is_refused_with_what_can(model, layout, reason):
    assert reason in (why_not_tensor(model, layout) or "")
    assert why_not_tensor(decoder(), replace(layout, tensor=2)) is None


def _dropped():
    """The embedded tokens of one row of equal tokens, half dropped: this process's stretch of them."""
    runtime = Runtime.start(CPU, LayoutConfig(tensor=2))
    torch.manual_seed(torch.distributed.get_rank())
    model = decoder(embedding_dropout=0.5, context=256).build()
    model.initialise(0)
    divide_matrices(model.train(), runtime.mesh)
    x_BTD = model.stem(torch.zeros(1, 256, dtype=torch.long), None, torch.float32)
    model.hidden(torch.zeros(1, 256, dtype=torch.long)).square().sum().backward()
    return (x_BTD == 0).detach(), all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_each_stretch_of_the_stream_drops_its_own_elements():
    (first, fine), (second, fine_too) = run_processes(2, _dropped)
    assert fine and fine_too and first.shape == second.shape == (1, 128, 32)
    for part in (first, second):
        assert abs(float(part.float().mean()) - 0.5) < 0.03
    assert abs(float((first == second).float().mean()) - 0.5) < 0.03       # not the same mask twice
