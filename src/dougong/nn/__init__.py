"""The parts models are made of. Each takes `x_BTD` and returns `x_BTD`, in the precision of `x`.

Shape legend of the package: B batch, T tokens, S keys read, D width, N query heads, K key/value heads, H head
width, F feed-forward width, V vocabulary.
"""

from dougong.core.table import Table

NORMS = Table("norm", {
    "rms_norm": "dougong.nn.norm:RMSNormConfig",
    "layer_norm": "dougong.nn.norm:LayerNormConfig",
})
POSITIONS = Table("position scheme", {
    "rope": "dougong.nn.position:RoPEConfig",
    "learned": "dougong.nn.position:LearnedConfig",
    "sinusoidal": "dougong.nn.position:SinusoidalConfig",
    "rope_alibi": "dougong.nn.position:RoPEALiBiConfig",
    "alibi": "dougong.nn.position:ALiBiConfig",
    "none": "dougong.nn.position:NoPositionConfig",
})
FEED_FORWARDS = Table("feed-forward", {
    "swiglu": "dougong.nn.feed_forward:SwiGLUConfig",
    "gelu": "dougong.nn.feed_forward:GELUConfig",
    "relu2": "dougong.nn.feed_forward:ReLU2Config",
    "moe": "dougong.nn.moe:MoEConfig",
})
RESIDUALS = Table("residual stream", {
    "plain": "dougong.nn.residual:PlainResidualConfig",
    "x0": "dougong.nn.residual:X0ResidualConfig",
})

__all__ = ["FEED_FORWARDS", "NORMS", "POSITIONS", "RESIDUALS"]
