"""A model of fewer tokens computes the same for those it has."""

import pytest
import torch
from tiny_decoders import tiny

from dougong.adapt.vocabulary import with_vocabulary


@pytest.mark.parametrize(("family", "changes"), [("qwen3", {}), ("nano", {}), ("nano", {"value_embeddings": "all"})])
def test_logits_of_kept_tokens_stay(family, changes):
    model, kept = tiny(family, **changes), [0, 3, 4, 10, 60]
    made = with_vocabulary(model, kept)
    ids = torch.tensor([[0, 2, 4, 1, 3]])
    torch.testing.assert_close(made(ids), model(torch.tensor(kept)[ids])[..., kept])
    assert made.config.vocab_size == 5
