"""A model that knows fewer tokens: rows of its tables, chosen."""

from collections.abc import Sequence
from typing import Any

import torch

from dougong.core.config import replace
from dougong.models.heads import keep_value_head


@torch.no_grad()
def with_vocabulary(model: Any, kept: Sequence[int]) -> Any:
    """A new model of the same family whose token i is the old one's token `kept[i]`.

    Everything else is the same, so its logits are the old ones' of these tokens: probabilities only gain from what the
    others had.
    """
    rows = torch.as_tensor(kept, device=next(model.parameters()).device)
    made = replace(model.config, vocab_size=len(kept)).build()
    keep_value_head(made, model)
    made.to(rows.device)
    made.compute_dtype = model.compute_dtype
    made.load_state_dict({name: tensor[rows] if _is_table(name) else tensor
                          for name, tensor in model.state_dict().items()})
    return made.eval()


def _is_table(name: str) -> bool:
    """Whether the tensor has a row for each token."""
    return name in ("stem.tokens.weight", "head.weight") or name.startswith("stem.values.")
