"""Expert parallelism: every process holds some of the experts, and tokens travel to theirs and back.

(GShard: Lepikhin et al. 2020, arXiv:2006.16668.) A process's rows lie sorted by expert, so what goes to one process
lies together: one exchange brings rows to their experts, one brings them back, with as many rows for each pair of
processes as the router chose, none dropped, none padded. Their numbers have to be known to the host: each layer reads
2 · expert integers from the device in its forward.

Router and shared experts are as on one process. An expert's gradient holds the tokens of all processes along `expert`
already, so it is summed over the other axes alone.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from dougong.core.errors import ConfigError
from dougong.nn.moe import Exchange, Experts, MoE, is_shape_only, take_rows
from dougong.runtime.mesh import Mesh


def divide_experts(model: nn.Module, mesh: Mesh) -> None:
    """Leaves each process its share of every layer's experts (E/expert of them, as DTensors divided along `expert`).

    Nothing where `expert` is 1. Raises ConfigError, with the reason, where the model cannot be divided so.
    """
    size = mesh.size("expert")
    if size == 1:
        return
    if reason := why_not_experts(getattr(model, "config", None), size, tensor=mesh.size("tensor")):
        raise ConfigError(reason)
    for layer in model.modules():
        if isinstance(layer, MoE):
            for name, stack in list(layer.experts.named_parameters()):
                setattr(layer.experts, name, _share(stack, mesh))
            layer.exchange = exchange(mesh.group("expert"), size)


def why_not_experts(config: Any, expert: int, tensor: int = 1) -> str | None:
    """Why this model's experts cannot be divided between `expert` processes; None if they can."""
    if expert == 1:
        return None
    section = config.decoder().feed_forward if hasattr(config, "decoder") else None
    if section is None or section.kind != "moe":
        return (f"layout.expert={expert} divides experts, and model.kind={getattr(config, 'kind', None)} has none. "
                "Try layout.expert=1, or model.feed_forward=moe.")
    if section.num_experts % expert:
        fits = next(d for d in range(min(expert, section.num_experts), 0, -1) if section.num_experts % d == 0)
        return (f"layout.expert={expert} does not divide num_experts={section.num_experts}: each process holds as "
                f"many. Try layout.expert={fits}.")
    if tensor > 1:
        return (f"layout.expert={expert} with layout.tensor={tensor}: an expert is not divided further, so processes "
                "along tensor would compute the same. Try layout.tensor=1.")
    return None


def _share(stack: Tensor, mesh: Mesh) -> nn.Parameter:
    """This process's part of a stack that every process holds alike (or on meta)."""
    mine = stack.detach().chunk(mesh.size("expert"))[mesh.rank("expert")].clone()
    return nn.Parameter(DTensor.from_local(mine, mesh.along("expert"), [Shard(0)], run_check=False))


def exchange(group: Any, size: int) -> Exchange:
    """Rows to their experts and back, over the `size` processes of a group."""
    def to_experts_and_back(experts: Experts, rows_RD: Float[Tensor, "R D"],
                            ends_E: Int[Tensor, "E"]) -> Float[Tensor, "R D"]:
        sent_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
        come_Pe = collectives.all_to_all_single(sent_E, None, None, group).view(size, -1)     # from P, for my experts
        if is_shape_only(rows_RD):      # as many to each: what a plan assumes
            sent = come = [len(rows_RD) // size] * size
        else:
            sent, come = torch.stack([sent_E.view(size, -1).sum(1), come_Pe.sum(1)]).tolist()
        arrived_AD = collectives.all_to_all_single_autograd(rows_RD, come, sent, group)
        order_A, place_A = _by_expert(come_Pe, sum(come))
        mine_AD = take_rows(arrived_AD, order_A, place_A, 1)
        done_AD = take_rows(experts(mine_AD, come_Pe.sum(0).cumsum(0).int()), place_A, order_A, 1)
        return collectives.all_to_all_single_autograd(done_AD, sent, come, group)
    return to_experts_and_back


def _by_expert(come_Pe: Int[Tensor, "P e"], rows: int) -> tuple[Int[Tensor, "A"], Int[Tensor, "A"]]:
    """The order that brings rows which arrived process by process, each sorted by expert, into that of the experts
    alone; and its inverse."""
    P, e = come_Pe.shape
    experts = torch.arange(e, device=come_Pe.device).repeat(P)
    expert_A = experts.repeat_interleave(come_Pe.flatten(), output_size=rows)
    order_A = expert_A.argsort(stable=True)
    place_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(rows, device=order_A.device))
    return order_A, place_A
