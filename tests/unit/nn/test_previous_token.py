"""A first layer whose head begins by looking at the token before."""

import pickle

import pytest
import torch

from dougong.core.errors import ConfigError
from dougong.interop.maps.qwen3 import config_to_hf, names
from dougong.models.compose import DecoderConfig
from dougong.models.families.qwen3 import Qwen3Config
from dougong.nn.attention import AttentionConfig
from dougong.nn.position import ALiBiConfig, Span, rotate
from dougong.nn.previous_token import SHARPNESS

SHAPES = [{"dim": 128, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
          {"dim": 96, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64},
          {"dim": 192, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128}]


def built(on: bool, seed: int = 0, **shape):
    model = Qwen3Config(vocab_size=512, context=128, num_layers=2, ffn_dim=256, previous_token_head=on, **shape).build()
    model.initialise(seed)
    return model


def attention_of_first_head(model) -> torch.Tensor:
    """(T, T), in float64 and without the model's own kernel."""
    tokens = torch.randint(512, (1, 128), generator=torch.Generator().manual_seed(1))
    block = model.stack["0"]
    x = block.attention_norm(model.stem(tokens, None, torch.float32))
    rotation = model.position.rotation(Span(T=128, device=tokens.device), torch.float32)
    width = block.attention.head_dim
    queries = block.attention.query_norm(block.attention.query(x).unflatten(-1, (-1, width)))
    keys = block.attention.key_norm(block.attention.key(x).unflatten(-1, (-1, width)))
    q, k = (rotate(part, rotation)[0, :, 0].double() for part in (queries, keys))
    scores = (q @ k.T / width**0.5).masked_fill(torch.ones(128, 128).triu(1) > 0, -torch.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_head_looks_at_the_token_before(shape, seed):
    with torch.no_grad():
        on, off = (attention_of_first_head(built(value, seed, **shape)) for value in (True, False))
    before = on.diagonal(-1)[1:]
    assert before.mean() > 0.8 and before.mean() > 10 * off.diagonal(-1)[1:].mean()
    others = on.tril().clone()
    others.diagonal(-1).zero_()
    assert (before > others[2:].max(1).values).double().mean() > 0.95


def test_what_begins_differently():
    on, off = built(True, **SHAPES[0]), built(False, **SHAPES[0])
    changed = {name for (name, a), b in zip(on.named_parameters(), off.parameters(), strict=True)
               if not torch.equal(a, b)}
    attention = {f"stack.0.attention.{part}.weight" for part in ("query", "key", "query_norm", "key_norm")}
    assert changed == {"stem.tokens.weight", *attention}
    query = on.stack["0"].attention.query.weight - off.stack["0"].attention.query.weight
    assert query[:64].abs().sum() > 0 and query[64:].abs().sum() == 0     # one head of two
    assert torch.linalg.matrix_rank(query) == 1
    assert on.stack["0"].attention.key_norm.weight.unique().tolist() == pytest.approx([1, SHARPNESS])


def test_what_the_embeddings_share_changes_no_probability():
    """A tied head adds h · m to every logit."""
    on, off = (built(value, **SHAPES[0]).stem.tokens.weight.double() for value in (True, False))
    assert (on - off).norm(dim=1).min() > 0.1
    hidden = torch.randn(4, 128, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close((hidden @ on.T).softmax(-1), (hidden @ off.T).softmax(-1), rtol=1e-5, atol=1e-9)


def test_an_export_does_not_know_of_it():
    on, off = (built(value, **SHAPES[0]).config for value in (True, False))
    assert config_to_hf(on) == config_to_hf(off)
    assert names(on) == names(off)


def test_needs_rope_and_norms_before():
    sizes = {"vocab_size": 64, "context": 32, "dim": 64, "num_layers": 2, "previous_token_head": True}
    heads = AttentionConfig(num_heads=2)
    for wrong in ({"position": ALiBiConfig()}, {"norm_placement": "post"}):
        with pytest.raises(ConfigError, match="previous_token_head"):
            DecoderConfig(attention=heads, **sizes, **wrong).build()


def test_a_model_can_be_stored_whole():
    model = built(True, **SHAPES[0])
    copy = pickle.loads(pickle.dumps(model))
    copy.initialise(1)
    model.initialise(1)
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True))


def test_built_without_memory_it_begins_alike():
    config = Qwen3Config(vocab_size=512, context=128, num_layers=2, ffn_dim=256, previous_token_head=True, **SHAPES[0])
    with torch.device("meta"):
        empty = config.build()
    empty.to_empty(device="cpu")
    empty.initialise(0)
    for mine, theirs in zip(empty.parameters(), built(True, **SHAPES[0]).parameters(), strict=True):
        assert torch.equal(mine, theirs)
