"""Which keys a query may read, decided once per forward and window, and shared by the layers that use it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dougong.nn.position import Span


@dataclass(frozen=True)
class Mask:
    """What the kernels need to know about visibility.

    `causal`: query t reads keys 0…t of equally many, and nothing else restricts it, so kernels may use their
    own causal path. `bias`: added to the scores, -inf where a key is hidden, (B or 1) × (N or 1) × T × S.
    Never both; neither means every key is visible, as for one new token that continues a cache.
    """

    causal: bool = False
    bias: Float[Tensor, "b n T S"] | None = None


def build_mask(span: Span, *, window: int | None = None, position_bias: Float[Tensor, "N T S"] | None = None,
               dtype: torch.dtype) -> Mask:
    """The mask of a span's T queries against all S = span.end keys.

    Key s is visible to the query at index q where s <= q, s >= start_B, q - s < window, and both are of one
    segment. A query always reads its own key, so padding before `start_B` yields finite rubbish instead of
    NaN.
    """
    start_B = span.start_B
    plain = start_B is None and span.segment_BS is None and position_bias is None
    if plain and not (window is not None and window < span.end):
        if span.length == 0:
            return Mask(causal=True)
        if span.T == 1:
            return Mask()
    s_S = torch.arange(span.end, device=span.device)
    q_T1 = s_S[span.length:, None]
    visible = (s_S <= q_T1)[None, None]
    if window is not None:
        visible = visible & (q_T1 - s_S < window)
    if start_B is not None:
        visible = visible & ((s_S >= start_B[:, None, None, None]) | (s_S == q_T1))
    if span.segment_BS is not None:
        segment_BS = span.segments()
        visible = visible & (segment_BS[:, span.length:, None] == segment_BS[:, None, :])[:, None]
    zero = torch.zeros((), device=span.device, dtype=dtype)
    bias = zero if position_bias is None else position_bias.to(dtype)[None]
    return Mask(bias=torch.where(visible, bias, float("-inf")))
