"""A model of fewer tokens computes the same for those it has."""

import pytest
import torch
from tiny_decoders import tiny

from dougong.adapt.vocabulary import with_vocabulary
from dougong.models.heads import add_value_head


@pytest.mark.parametrize(("family", "changes"), [("qwen3", {}), ("nano", {}), ("nano", {"value_embeddings": "all"})])
def test_logits_of_kept_tokens_stay(family, changes):
    model, kept = tiny(family, **changes), [0, 3, 4, 10, 60]
    made = with_vocabulary(model, kept)
    ids = torch.tensor([[0, 2, 4, 1, 3]])
    torch.testing.assert_close(made(ids), model(torch.tensor(kept)[ids])[..., kept])
    assert made.config.vocab_size == 5


def test_a_head_for_values_stays_as_it_is():
    model = tiny()
    add_value_head(model, 2)
    torch.nn.init.normal_(model.value.weight)
    made = with_vocabulary(model, [0, 3, 4])
    torch.testing.assert_close(made.value.weight, model.value.weight, rtol=0, atol=0)
