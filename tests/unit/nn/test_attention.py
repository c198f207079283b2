"""Attention's kernels against float64, and what its config accepts."""

import math
from functools import partial

import pytest
import torch

from dougong.core.errors import ConfigError
from dougong.nn.attention import AttentionConfig
from dougong.nn.attention_kernels import BLOCKS_UP_TO, blocked, choose_kernel, explicit, fused
from dougong.nn.dropout import random_bytes
from dougong.nn.mask import Mask, build_mask
from dougong.nn.position import ALiBi, RoPEALiBiConfig, Span

B, T, H = 2, 13, 16


class OnCUDA(torch.Tensor):
    """Numbers of the host that say they lie on CUDA."""

    device = property(lambda self: torch.device("cuda"))


def fused_on_cuda(q, k, v, mask, dropout=0.0):
    return fused(*(x.as_subclass(OnCUDA) for x in (q, k, v)), mask, dropout=dropout).as_subclass(torch.Tensor)


KERNELS = {"fused": fused, "fused on CUDA": fused_on_cuda, "explicit": explicit,
           "blocks of 4": partial(blocked, block=4), "blocked": blocked}
CPU = torch.device("cpu")
SEGMENT = torch.tensor([[0] * 4 + [1] * 9, [3] * 11 + [4] * 2])
MASKS = {
    "causal": lambda N: ({}, None),
    "window": lambda N: ({"window": 5}, None),
    "segments": lambda N: ({"segment_BS": SEGMENT}, None),
    "padded, windowed": lambda N: ({"start_B": torch.tensor([4, 0]), "window": 7}, None),
    "alibi": lambda N: ({}, ALiBi(N)),
    "alibi, segments": lambda N: ({"segment_BS": SEGMENT}, ALiBi(N)),
}


def mask_of(name, N, dtype):
    values, alibi = MASKS[name](N)
    window = values.pop("window", None)
    span = Span(T=T, device=CPU, **values)
    return build_mask(span, window=window, position_bias=alibi.bias(span) if alibi else None, dtype=dtype)


def naive(q, k, v, name, *, N):
    """Attention from its definition: one query at a time, over the keys that the rules name."""
    values, alibi = MASKS[name](N)
    rows = []
    for b in range(B):
        heads = []
        for n in range(N):
            kv = n // (N // k.shape[1])
            outputs = []
            for t in range(T):
                keys = [s for s in range(t + 1)
                        if s == t or (
                            t - s < values.get("window", T)
                            and s >= (values["start_B"][b] if "start_B" in values else 0)
                            and ("segment_BS" not in values or SEGMENT[b, s] == SEGMENT[b, t]))]
                scores = torch.stack([q[b, n, t] @ k[b, kv, s] / math.sqrt(H)
                                      - (alibi.slopes[n] * (t - s) if alibi else 0) for s in keys])
                outputs.append(scores.softmax(0) @ v[b, kv, keys])
            heads.append(torch.stack(outputs))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def run(kernel, inputs, mask, weight):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = kernel(*leaves, mask)
    (y * weight.to(y.dtype)).sum().backward()
    return [y.detach(), *(x.grad for x in leaves)]


def sample(N, K):
    return [torch.randn(B, heads, T, H, dtype=torch.float64) for heads in (N, K, K)] + [
        torch.randn(B, N, T, H, dtype=torch.float64)]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(("N", "K"), [(4, 4), (6, 2), (3, 1)])
def test_each_kernel_is_attention_by_its_definition(name, kernel, N, K):
    *inputs, weight = sample(N, K)
    found = run(kernel, inputs, mask_of(name, N, torch.float64), weight)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = naive(*leaves, name, N=N)
    (y * weight).sum().backward()
    for mine, exact in zip(found, [y.detach(), *(x.grad for x in leaves)]):
        assert torch.isfinite(mine).all()
        # float64 in another order of summation; ALiBi's slope times distance is made in float32.
        assert (mine - exact).abs().max() < (1e-5 if "alibi" in name else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "window", "segments"])
def test_kernels_round_no_worse_than_the_plainest_one(dtype, name):
    *inputs, weight = sample(6, 2)
    # The inputs are rounded first, so that only the kernel's own rounding is judged.
    inputs = [x.to(dtype).double() for x in inputs]
    weight = weight.to(dtype).double()
    exact = run(explicit, inputs, mask_of(name, 6, torch.float64), weight)
    low = [x.to(dtype) for x in inputs]
    plainest = run(_plainest, low, mask_of(name, 6, dtype), weight)
    for label, kernel in KERNELS.items():
        for mine, plain, truth in zip(run(kernel, low, mask_of(name, 6, dtype), weight), plainest, exact):
            assert mine.dtype == dtype and torch.isfinite(mine).all()
            error, allowed = (mine - truth).norm(), 2 * (plain - truth).norm()
            assert error <= allowed, (label, error / truth.norm(), allowed / truth.norm())


def _plainest(q, k, v, mask, dropout=0.0):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask.causal:
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
    else:
        scores = scores + mask.bias
    return scores.softmax(-1) @ v


def test_the_rule_chooses_by_device_precision_and_length():
    def chosen(dtype, S, device="cpu", T=None):
        q = torch.empty(1, 2, T or S, 8, dtype=dtype, device=device)
        return choose_kernel(q, torch.empty(1, 2, S, 8, dtype=dtype, device=device))

    assert chosen(torch.bfloat16, 64) is blocked and chosen(torch.float32, BLOCKS_UP_TO) is blocked
    assert chosen(torch.bfloat16, BLOCKS_UP_TO + 1) is fused
    assert chosen(torch.bfloat16, 64, T=1) is fused     # one token that continues a cache
    assert chosen(torch.bfloat16, 64, "meta") is fused


@pytest.mark.parametrize("kernel", [fused, explicit, partial(blocked, block=16)], ids=["fused", "explicit", "blocks"])
def test_attention_dropout_keeps_the_mean(kernel):
    q, v = torch.zeros(1, 1, 64, 8), torch.ones(1, 1, 64, 8)
    # The last query reads all keys, however the kernel cuts its work.
    y = torch.stack([kernel(q, q, v, Mask(causal=True), dropout=0.25)[:, :, -1:] for _ in range(3200)])
    # 64 keys of weight 1/64, each kept with probability 0.75 and scaled by 4/3: mean 1, variance 1/(3·64).
    assert abs(y.mean().item() - 1) < 5 * math.sqrt(1 / (3 * 64) / 3200)
    assert abs(y[..., 0].var().item() * 3 * 64 - 1) < 0.2


@pytest.mark.parametrize(("kernel", "name", "heads"), [
    (fused_on_cuda, "window", 6), (fused_on_cuda, "causal", 2), (fused, "window", 2)])
def test_on_cuda_a_bias_meets_a_key_head_for_each_query_head(kernel, name, heads, monkeypatch):
    """Of PyTorch's forms on CUDA only flash reads shared heads, and it takes no bias."""
    asked, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, **options):
        asked.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    kernel(*sample(6, 2)[:3], mask_of(name, 6, torch.float64))
    assert asked == [(heads, heads, heads != 6)]


def test_slopes_are_copied_to_a_device_once(monkeypatch):
    """On CUDA each copy from the host waits for what the device has still to do."""
    alibi, span, made, tensor = ALiBi(4), Span(T=3, device=CPU), [], torch.tensor
    both = RoPEALiBiConfig().build(dim=32, head_dim=8, num_heads=4, context=8, init=None)
    monkeypatch.setattr(torch, "tensor", lambda *values, **options: made.append(values) or tensor(*values, **options))
    for position in (alibi, both):
        with torch.inference_mode():
            first = position.bias(span)
        again = position.bias(span)
        assert torch.equal(first, again) and not position._on[CPU].is_inference()
    assert len(made) == 2


def test_no_mask_is_built_where_causality_is_enough():
    assert build_mask(Span(T=8, device=CPU), dtype=torch.float32) == Mask(causal=True)
    assert build_mask(Span(T=8, device=CPU), window=8, dtype=torch.float32) == Mask(causal=True)
    assert build_mask(Span(T=1, length=7, device=CPU), dtype=torch.float32) == Mask()
    assert build_mask(Span(T=1, length=7, device=CPU), window=7, dtype=torch.float32).bias is not None
    assert build_mask(Span(T=2, length=6, device=CPU), dtype=torch.float32).bias is not None


@pytest.mark.parametrize(("values", "dim", "words"), [
    ({"num_heads": 6}, 32, r"dim=32 .*num_heads=6.*Try num_heads=4"),
    ({"num_heads": 6, "num_kv_heads": 4}, 48, r"num_kv_heads=4 .*num_heads=6.*Try num_kv_heads=3"),
    ({}, 32, "num_heads=None"),
])
def test_heads_that_do_not_fit_are_explained(values, dim, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        AttentionConfig(**values).build(dim=dim)


def test_a_head_width_of_its_own_frees_the_width_of_the_model():
    attention = AttentionConfig(num_heads=6, head_dim=10).build(dim=32)
    assert attention.query.weight.shape == (60, 32) and attention.output.weight.shape == (32, 60)


@pytest.mark.parametrize("block", [4, 16])
def test_dropped_weights_have_the_gradients_that_autograd_finds(block):
    q, k, v, weight = (torch.randn(2, 3, 16, 8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    state = torch.get_rng_state()
    mine = blocked(q, k, v, Mask(causal=True), dropout=0.25, block=block)
    found = torch.autograd.grad((mine * weight).sum(), (q, k, v))
    torch.set_rng_state(state)
    keep = (random_bytes((6, 16, 16), CPU) >= 64).double().view(2, 3, 16, 16) * 256 / 192
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(16, 16).triu(1).bool(), float("-inf"))
    exact = (scores.softmax(-1) * keep) @ v
    assert torch.allclose(mine, exact, atol=1e-12)
    for a, b in zip(found, torch.autograd.grad((exact * weight).sum(), (q, k, v))):
        assert torch.isfinite(a).all() and torch.allclose(a, b, atol=1e-12)
