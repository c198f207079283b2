"""Blocks of text whose keys and values are kept, so that a request that begins alike need not read them again."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dougong.generate.lanes import BLOCK

Stored = dict[int, tuple[Tensor, Tensor]]
"""keys and values of one block by layer, (K BLOCK H) each"""

_Key = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class _Block:
    serial: int
    stored: Stored


class Prefixes:
    """Blocks by the block before them and their own tokens.

    The key holds the tokens themselves, which the dictionary compares, so texts whose hashes collide are not confused.
    A used block becomes the newest, its predecessors newer still: the oldest is always one on which no other rests.
    Requests copy what they find, so any block may be dropped at any time.
    """

    def __init__(self) -> None:
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._serial = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for block in self._blocks.values()
                   for pair in block.stored.values() for t in pair)

    def find(self, tokens: Sequence[int]) -> list[Stored]:
        """The blocks held of this text's beginning, from the first on."""
        chain = self._chain(tokens)
        self._touch(chain)
        return [self._blocks[key].stored for key in chain]

    def keep(self, tokens: Sequence[int], copy: Callable[[int], Stored], room: Callable[[], bool]) -> None:
        """Keeps the whole blocks of a text: `copy(i)` gives block i, as long as `room()` finds place for another."""
        chain = self._chain(tokens)
        self._touch(chain)   # or room() might drop the very blocks on which the new ones rest
        for i in range(len(chain), len(tokens) // BLOCK):
            if not room() or (chain and chain[-1] not in self._blocks):
                break
            self._serial += 1
            chain.append(self._key(chain, tokens, i))
            self._blocks[chain[-1]] = _Block(self._serial, copy(i))
            self._touch(chain)

    def drop_oldest(self) -> None:
        self._blocks.popitem(last=False)

    def _chain(self, tokens: Sequence[int]) -> list[_Key]:
        chain: list[_Key] = []
        for i in range(len(tokens) // BLOCK):
            key = self._key(chain, tokens, i)
            if key not in self._blocks:
                break
            chain.append(key)
        return chain

    def _key(self, chain: list[_Key], tokens: Sequence[int], i: int) -> _Key:
        return (self._blocks[chain[-1]].serial if chain else 0), tuple(tokens[i * BLOCK:(i + 1) * BLOCK])

    def _touch(self, chain: list[_Key]) -> None:
        for key in reversed(chain):
            self._blocks.move_to_end(key)
