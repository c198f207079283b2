"""Writing with a model: cache, sampling, the engine over token ids, and text."""

from dougong.generate.cache import KVCache
from dougong.generate.engine import Decoding, Engine, Token
from dougong.generate.request import Constraint, Request
from dougong.generate.sampling import SamplingConfig
from dougong.generate.scheduler import Scheduler
from dougong.generate.text import Generation, generate

__all__ = ["Constraint", "Decoding", "Engine", "Generation", "KVCache", "Request", "SamplingConfig", "Scheduler",
           "Token", "generate"]
