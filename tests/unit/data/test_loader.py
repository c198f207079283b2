"""One order of the data, the same for any number of processes, restored anywhere at once."""

import json
import time
from collections import Counter

import numpy as np
import pytest
import torch

from dougong.core.errors import CheckpointError, ConfigError
from dougong.data.loader import Loader, batches_in_order
from dougong.data.mix import Mixture, Permutation


class Rows:
    """A pack whose row r holds the token r everywhere."""

    method = "windows"

    def __init__(self, rows: int, context: int = 4, first: int = 0) -> None:
        self.rows, self.context, self.first = rows, context, first
        self.phases: list[int] = []

    def fields(self, rows, phase):
        self.phases.append(phase)
        tokens = np.repeat(rows[:, None] + self.first, self.context, axis=1)
        return {"tokens": tokens, "targets": tokens, "weight": np.ones(tokens.shape, np.float32)}


def loader(rows=4, packs=None, **options) -> Loader:
    return Loader(packs or [Rows(37)], rows=rows, **{"seed": 7, "fingerprint": "f" * 64, **options})


def drawn(source, count: int) -> list[int]:
    return [int(token) for _ in range(count) for token in next(source)["tokens"][:, 0]]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 65_537])
def test_permutation_hits_every_index_once(size):
    assert sorted(Permutation(size, 3)(np.arange(size)).tolist()) == list(range(size))


def test_permutation_is_uniform_over_seeds():
    """Chi-square over where each of 6 indices goes and over all 24 orders of 4; 0.1 % limits."""
    places = np.array([Permutation(6, seed)(np.arange(6)) for seed in range(3000)])
    for column in places.T:
        assert ((np.bincount(column, minlength=6) - 500) ** 2 / 500).sum() < 20.5    # 5 degrees of freedom
    orders = Counter(tuple(Permutation(4, seed)(np.arange(4)).tolist()) for seed in range(4800))
    assert len(orders) == 24
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 49.7         # 23 degrees of freedom


def test_neighbours_are_torn_apart():
    values = Permutation(100_000, 1)(np.arange(100_000))
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.015


def test_quotas_hold_at_every_moment():
    mixture = Mixture([50, 1000, 300], [0.5, 0.3, 0.2], seed=0)
    part = np.empty(40_000, np.int64)
    for place in mixture.at(np.arange(40_000)):
        part[place.slots] = place.part
    for index, share in enumerate(mixture.shares):
        assert np.abs(np.cumsum(part == index) - share * np.arange(1, 40_001)).max() <= 1.5
    assert mixture.shares == pytest.approx([0.5, 0.3, 0.2], abs=1 / 16_384)


def test_each_part_of_a_mixture_is_gone_through_before_it_repeats():
    source = loader(rows=8, packs=[Rows(10), Rows(1000, first=100)], shares=[0.5, 0.5])
    small = [row for row in drawn(source, 10) if row < 100]
    assert len(small) == 40
    passes = [small[start:start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes) and len(set(map(tuple, passes))) == 4


def test_tiny_shares_still_get_their_turn():
    assert min(Mixture([5, 5], [1e-9, 1], seed=0).shares) > 0
    with pytest.raises(ConfigError, match="above 0"):
        Mixture([5, 5], [0, 1], seed=0)


def test_an_epoch_is_every_row_once_in_a_new_order():
    rows = drawn(loader(rows=1), 74)
    assert sorted(rows[:37]) == sorted(rows[37:]) == list(range(37)) and rows[:37] != rows[37:]
    assert rows[:37] != drawn(loader(rows=1, seed=8), 37)
    assert drawn(loader(rows=4), 18) == rows[:72]          # the batch size does not change the order


def test_windows_shift_from_epoch_to_epoch():
    pack = Rows(10, context=1000)
    source = loader(rows=5, packs=[pack])
    phases = [source.batch(number) and pack.phases[-1] for number in range(8)]
    assert phases[0::2] == phases[1::2] and len(set(phases)) == 4


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_read_slices_of_one_sequence(world_size):
    whole = drawn(loader(rows=8), 20)
    ranks = [loader(rows=8, rank=rank, world_size=world_size) for rank in range(world_size)]
    shared = [row for _ in range(20) for source in ranks for row in drawn(source, 1)]
    assert shared == whole


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(ConfigError, match="Try a batch of 9 rows"):
        loader(rows=10, world_size=3)


@pytest.mark.parametrize("consumed", [0, 1, 9, 25])
def test_a_restored_loader_goes_on_as_if_nothing_happened(consumed):
    source = loader()
    drawn(source, consumed)
    state = json.loads(json.dumps(source.state_dict()))
    expected = drawn(source, 30)
    other = loader()
    drawn(other, 3)                                         # has prefetched something else
    other.load_state_dict(state)
    assert (other.position, other.epoch) == (consumed, consumed * 4 // 37)
    assert drawn(other, 30) == expected


def test_prefetching_does_not_move_the_state():
    source = loader()
    next(source)
    time.sleep(0.05)
    assert source.state_dict()["position"] == 1
    assert torch.equal(next(source)["tokens"], source.batch(1)["tokens"])


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "e" * 64},
        {"rows": 8},
        {"seed": 8},
        {"packs": [Rows(37, context=8)]},
        {"packs": [Rows(36)]},
    ],
)
def test_the_state_of_another_sequence_is_refused(change):
    state = loader().state_dict()
    with pytest.raises(CheckpointError, match="checkpoint"):
        loader(**change).load_state_dict(state)


def test_another_number_of_processes_may_go_on():
    state = loader(rows=8).state_dict() | {"position": 5}
    source = loader(rows=8, rank=1, world_size=2)
    source.load_state_dict(state)
    assert drawn(source, 1) == [int(row) for row in loader(rows=8).batch(5)["tokens"][4:, 0]]


@pytest.mark.parametrize("position", [0, 10**6, 10**12])
def test_restoring_takes_under_50_ms_anywhere(position):
    packs = [Rows(10**9), Rows(10**7 + 3)]
    state = loader(packs=packs, rows=64, shares=[3, 1]).state_dict() | {"position": position}
    source = loader(packs=packs, rows=64, shares=[3, 1])
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        source.load_state_dict(state)
        next(source)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_errors_in_the_background_reach_the_caller():
    class Broken(Rows):
        def fields(self, rows, phase):
            raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        next(loader(packs=[Broken(10)]))


def test_once_in_order_is_once_in_order():
    batches = list(batches_in_order([Rows(10), Rows(3, first=10)], rows=4))
    assert [batch.rows for batch in batches] == [4, 4, 2, 3]
    assert torch.cat([batch["tokens"][:, 0] for batch in batches]).tolist() == list(range(13))
