"""What decoding asks of CUDA's attention, seen on tensors that only say they lie there."""

import pytest
import torch

from dougong.generate.fused import FusedAttention
from dougong.nn.attention import AttentionConfig
from dougong.nn.mask import Mask

N, K, H = 4, 2, 8


class OnCUDA(torch.Tensor):
    """Numbers of the host that say they lie on CUDA."""

    device = property(lambda self: torch.device("cuda"))


KINDS = {"cpu": torch.Tensor, "cuda": OnCUDA}

@pytest.fixture
def asked(monkeypatch):
    """What PyTorch's attention is given: the bias, and whether cuDNN may serve."""
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(*tensors, attn_mask=None, **options):
        calls.append((attn_mask, torch.backends.cuda.cudnn_sdp_enabled()))
        return attend(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    return calls


def attention():
    return FusedAttention(AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H).build(dim=32))


def tensors(B, T, S, device):
    return [torch.randn(B, heads, tokens, H).as_subclass(KINDS[device]) for heads, tokens in ((N, T), (K, S), (K, S))]


@pytest.mark.parametrize(("device", "T", "S", "per_head", "cudnn"), [
    ("cuda", 1, 9, False, False), ("cuda", 1, 9, True, False),
    ("cuda", 3, 9, False, False),       # guesses that are tried
    ("cuda", 9, 9, False, True),        # a prompt
    ("cpu", 1, 9, False, True)])
def test_what_continues_a_text_is_not_planned_anew_for_each_length(device, T, S, per_head, cudnn, asked):
    bias = torch.randn(1, N if per_head else 1, T, S).as_subclass(KINDS[device]) if per_head or T > 1 else None
    attention()._attend(*tensors(2, T, S, device), Mask(bias=bias))
    assert [allowed for _, allowed in asked] == [cudnn] and torch.backends.cuda.cudnn_sdp_enabled()


def test_whoever_has_switched_cudnn_off_finds_it_so(asked):
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        attention()._attend(*tensors(2, 1, 9, "cuda"), Mask())
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(("device", "rows", "begin"), [
    ("cuda", 2, 0), ("cuda", 1, 0),     # of a bias of one row the slice counts as contiguous wherever it begins
    ("cpu", 2, 3)])
def test_the_bias_of_a_shorter_lane_begins_where_cuda_can_load_it(device, rows, begin, asked):
    q, k, v = tensors(2, 1, 10, device)
    bias = torch.randn(rows, 1, 1, 10).as_subclass(KINDS[device])
    parts = [(slice(0, 1), k[:1], v[:1]), (slice(1, 2), k[1:, :, 3:], v[1:, :, 3:])]
    attention()._attend_lanes(q, parts, Mask(bias=bias))
    (whole, _), (end, _) = asked
    assert torch.equal(whole, bias[:1]) and torch.equal(end, bias[-1:, ..., 3:])
    assert whole.storage_offset() == 0 and end.storage_offset() % 10 == begin
