"""Counts the bytes of tensors while code runs, whether the tensors are real, fake or on the meta device."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    from torch.distributed.tensor import DTensor
except ImportError:      # torch built without distributed
    DTensor = None


class MemoryCounter(TorchDispatchMode):
    """Bytes of all storages alive that were made inside, by kind, and the most there ever were.

    `kind` is what new storages are counted as; `label` counts known tensors as another. Operations on DTensors are
    handed back, so that what they do to local tensors is seen; storages that FSDP empties and fills are followed.
    Collectives are counted by name, with the bytes that each process puts in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "temporary"
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.peak_bytes = 0
        self.collectives: Counter[tuple[str, str]] = Counter()
        self.collective_bytes: Counter[tuple[str, str]] = Counter()
        self.groups: dict[str, str] = {}
        """process group name -> axis, for the collectives' names"""
        self._alive: dict[int, tuple[str, int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor is not None and any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if func is torch.ops.aten.nonzero.default and (args[0].is_meta or isinstance(args[0], FakeTensor)):
            return args[0].new_empty((0, args[0].dim()), dtype=torch.long)   # how many there are is in the data
        if func.namespace == "aten" and func._opname.startswith("_fused_") and args[0][0].is_meta:
            return None     # an optimiser's fused update works in place; not all have a form without numbers
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("_c10d_functional", "c10d"):
            self._count_collective(func, args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def label(self, tensors: Any, kind: str) -> None:
        """Counts the storages of these tensors as `kind`, whether they were seen before or not."""
        for tensor in tensors:
            storage = _local(tensor).untyped_storage()
            known = self._alive.get(storage._cdata)
            if known is None:
                self._add(storage, kind)
            else:
                self._alive[storage._cdata] = (kind, *known[1:])
                self._move(known[0], -known[1])
                self._move(kind, known[1])
        self._look()

    def __enter__(self) -> "MemoryCounter":
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resized   # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize    # type: ignore[method-assign]
        super().__exit__(*failure)

    @property
    def _resized(self) -> Any:
        counter, resize = self, self._resize

        def resize_(storage: Any, size: int) -> Any:
            done = resize(storage, size)
            if known := counter._alive.get(storage._cdata):
                counter._alive[storage._cdata] = (known[0], size, known[2])
                counter._move(known[0], size - known[1])
                counter._look()
            return done

        return resize_

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._alive:
            self._add(storage, self.kind)
            self._look()

    def _add(self, storage: Any, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive[key] = (kind, size, weakref.ref(storage, lambda _: self._freed(key)))
        self._move(kind, size)

    def _freed(self, key: int) -> None:
        kind, size, _ = self._alive.pop(key)
        self._move(kind, -size)

    def _move(self, kind: str, size: int) -> None:
        self.now[kind] += size

    def _look(self) -> None:
        if (total := sum(self.now.values())) > self.peak_bytes:
            self.peak_bytes, self.at_peak = total, self.now.copy()

    def _count_collective(self, func: Any, args: Any) -> None:
        name = func._opname
        if "wait" in name:
            return
        sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        axis = next((self.groups[a] for a in args if isinstance(a, str) and a in self.groups), "?")
        self.collectives[axis, name] += 1
        self.collective_bytes[axis, name] += max(sizes, default=0)


def _local(tensor: Any) -> Tensor:
    return tensor._local_tensor if DTensor is not None and isinstance(tensor, DTensor) else tensor
