"""Trading time for memory: forget what a block computed and compute it again on the way back."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dougong.core.errors import ConfigError


def checkpoint_blocks(model: nn.Module) -> int:
    """Makes every block of a numbered stack keep only its input during training; returns how many there are.

    Names of modules and weights stay as they are; without gradients (evaluation, generation) nothing changes.
    Dropout draws the same numbers again. Raises ConfigError for a model without numbered blocks.
    """
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleDict | nn.ModuleList)
              for name, block in module.named_children() if name.isdigit()]
    if not blocks:
        raise ConfigError("train.gradient_checkpointing=true has no effect on a model without a stack of "
                          "blocks.\n"
                          "Leave it out, or lower train.micro_rows to save memory.")
    for block in blocks:
        block.forward = _recomputed(block.forward)
    return len(blocks)


def _recomputed(forward: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
