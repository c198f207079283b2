"""What only a CUDA device can show: `make test-gpu`."""

import copy

import pytest
import torch

from dougong.core.config import replace
from dougong.data.batch import Batch
from dougong.generate import Engine, SamplingConfig
from dougong.generate.fused import FusedAttention
from dougong.models.families.qwen3 import Qwen3Config
from dougong.nn.attention import AttentionConfig
from dougong.nn.attention_kernels import fused
from dougong.nn.float8 import float8_product, multiply_in_float8, why_not_float8
from dougong.nn.mask import Mask
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.optim.build import MuonConfig
from dougong.recipes.assemble import compile_blocks
from dougong.recipes.start import Weights, begin
from dougong.runtime.device import Runtime
from dougong.train.shadow import tracked
from dougong.train.state import TrainState
from dougong.train.step import take_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CONFIG = Qwen3Config(vocab_size=97, context=64, dim=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32,
                     ffn_dim=128, previous_token_head=True)


def random_batch(*, rows: int, context: int, vocab_size: int) -> Batch:
    """Random tokens, each to be followed by the next."""
    tokens = torch.randint(vocab_size, (rows, context + 1), generator=torch.Generator().manual_seed(0))
    return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], weight=torch.ones(rows, context))


def model_on(device: str) -> torch.nn.Module:
    with torch.device("meta"):
        model = CONFIG.build()
    model = model.to_empty(device=device)
    model.initialise(0)
    return model


def test_logits_and_gradients_on_cuda_equal_those_on_the_cpu():
    batch = random_batch(rows=3, context=64, vocab_size=97)
    found = {}
    for device in ("cpu", "cuda"):
        model = model_on(device)
        losses = CausalLMConfig().build().losses(model, batch.to(torch.device(device)))
        losses.sums["model"].backward()
        found[device] = {name: p.grad.cpu() for name, p in model.named_parameters()}
    for name, gradient in found["cpu"].items():
        assert torch.isfinite(found["cuda"][name]).all()
        torch.testing.assert_close(found["cuda"][name], gradient, rtol=2e-3, atol=2e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize(("compiled", "again"), [(False, "none"), (True, "none"), (True, "selective")])
def test_a_batch_is_learned_by_heart_in_bf16(compiled, again, float8):
    runtime = Runtime(device=torch.device("cuda"), dtype=torch.bfloat16)
    if float8 and (reason := why_not_float8(runtime.device)):
        pytest.skip(reason)
    model = model_on("cuda")
    model.compute_dtype = torch.bfloat16
    model.stack.checkpoint_activations = again
    if float8:
        multiply_in_float8(model)
    if compiled:
        compile_blocks(model)
    state = TrainState(model, MuonConfig().build(model), lambda step: 1.0, loader=None)
    objective, batch = CausalLMConfig().build(), random_batch(rows=4, context=64, vocab_size=97)
    losses = [take_step(state, objective, batch, runtime, micro_rows=2, clip_norm=1.0,
                        weight=objective.weight(batch)).metrics["loss"] for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("M", [48, 21])
def test_products_in_float8_equal_those_on_the_cpu(M):
    if reason := why_not_float8(torch.device("cuda")):
        pytest.skip(reason)
    found = {}
    for device in ("cpu", "cuda"):
        draw = torch.Generator().manual_seed(0)
        x, weight, seed = (torch.randn(*shape, generator=draw).to(device) for shape in ((M, 64), (32, 64), (M, 32)))
        x.requires_grad_()
        weight.requires_grad_()
        y = float8_product(x, weight, None)
        y.backward(seed)
        found[device] = [tensor.detach().cpu() for tensor in (y, x.grad, weight.grad)]
    for mine, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-3 * float(theirs.abs().max()))   # fast sums


def test_a_vocabulary_that_grows_is_begun_from_weights_that_lie_on_the_device():
    grown, base = (replace(CONFIG, vocab_size=size).build() for size in (101, 97))
    base.initialise(0)
    expected, found = copy.deepcopy(grown), grown.cuda()
    for model, device in ((expected, "cpu"), (found, "cuda")):
        begin(model, Weights({name: tensor.to(device) for name, tensor in tracked(base).items()}, ""), seed=1)
    for name, tensor in tracked(expected).items():
        torch.testing.assert_close(tracked(found)[name].cpu(), tensor, rtol=0, atol=0)


def test_a_shorter_lane_reads_the_end_of_a_bias_as_on_the_cpu():
    """From a slice that begins at any number CUDA's memory-efficient attention cannot load."""
    part = FusedAttention(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16).build(dim=64))
    held = [torch.randn(2, heads, tokens, 16) for heads, tokens in ((4, 1), (2, 40), (2, 40))]
    bias = torch.where(torch.arange(40) < torch.tensor([0, 20])[:, None], float("-inf"), 0.0)[:, None, None]
    found = []
    for device in ("cpu", "cuda"):
        q, k, v = (x.to(device) for x in held)
        lanes = [(slice(0, 1), k[:1], v[:1]), (slice(1, 2), k[1:, :, 3:], v[1:, :, 3:])]
        found.append(part._attend_lanes(q, lanes, Mask(bias=bias.to(device))).cpu())
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-3)


def test_a_bias_over_shared_key_heads_needs_no_memory_for_the_scores():
    N, K, T, H = 8, 2, 4096, 64
    q, k, v = (torch.randn(1, heads, T, H, device="cuda", dtype=torch.bfloat16) for heads in (N, K, K))
    bias = torch.zeros(1, 1, T, T, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused(q, k, v, Mask(bias=bias))
    assert torch.cuda.max_memory_allocated() - before < N * T * T       # a byte for each score


def test_steps_of_decoding_leave_cudnn_out():
    """It makes a plan for each shape, and each token makes the keys longer."""
    engine = Engine(model_on("cuda"), Runtime(device=torch.device("cuda"), dtype=torch.bfloat16))
    steps = iter(engine.start([[1, 2, 3]], SamplingConfig(temperature=0, max_tokens=6)))
    next(steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert sum(1 for _ in steps) == 5
    names = {event.key for event in profile.key_averages()}
    assert any("scaled_dot_product" in name for name in names)
    assert not any("cudnn_attention" in name for name in names)
