"""The part that this process holds of a tensor, and where in the whole it lies."""

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: of a DTensor its part, the very memory.

    DTensor is known by what it has, because importing it takes half a second that one process need not spend.
    """
    return getattr(tensor, "_local_tensor", tensor)


def part_of(tensor: Tensor) -> tuple[slice, ...]:
    """The piece of the whole that `tensor` holds here, one slice per axis; all of it for a plain tensor.

    A DTensor's axis may be divided along several mesh axes, one after another: in their order, except that FSDP divides
    what tensor (or expert) parallelism left (its placement is then a strided shard), so it comes last. Pieces are
    those of `torch.chunk`: all as long as the first, but the last ones, which may be shorter or empty.
    """
    pieces = [slice(0, length) for length in tensor.shape]
    if local(tensor) is tensor:
        return tuple(pieces)
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    assert not any(placement.is_partial() for placement in placements), "a sum that is still to be taken is no part"
    divided = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    for axis in sorted(divided, key=lambda axis: hasattr(placements[axis], "split_factor")):
        dim = placements[axis].dim
        whole = pieces[dim]
        length = -(-(whole.stop - whole.start) // mesh.size(axis))
        start = min(whole.start + mesh.get_local_rank(axis) * length, whole.stop)
        pieces[dim] = slice(start, min(start + length, whole.stop))
    return tuple(pieces)
