"""Writing with a model: cache, sampling, the engine over token ids, and text."""

from dougong.generate.cache import KVCache
from dougong.generate.engine import Decoding, Engine, Token
from dougong.generate.sampling import SamplingConfig
from dougong.generate.text import Generation, generate

__all__ = ["Decoding", "Engine", "Generation", "KVCache", "SamplingConfig", "Token", "generate"]
