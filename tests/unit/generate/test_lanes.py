import random

import pytest
import torch

from dougong.generate.drafts import NGrams
from dougong.generate.lanes import BLOCK, Lane, Reading, width_for
from dougong.generate.prefixes import Prefixes

LAYERS, K, H = 2, 2, 3


def key(name, position, layer):
    return torch.full((K, H), float(1000 * name + position + 0.25 * layer))


def written(lane, T=1):
    """Reads T positions of every member (named by an integer); each key says whose it is and where it stands."""
    reading = Reading([lane])
    for layer in range(LAYERS):
        new = torch.stack([torch.stack([key(name, length + t, layer) for t in range(T)], 1)
                           for name, length in zip(lane.members, lane.lengths)])
        reading.update(layer, new, -new)
    reading.advance(T)


def check(lane):
    for row, (name, length) in enumerate(zip(lane.members, lane.lengths)):
        for layer in range(LAYERS):
            expected = torch.stack([key(name, position, layer) for position in range(length)], 1)
            held = lane.keys[layer][row, :, lane.end - length:lane.end]
            assert torch.equal(held, expected)
            assert torch.equal(lane.values[layer][row, :, lane.end - length:lane.end], -expected)


def one(name, length, width):
    lane = Lane(width)
    lane.begin(name)
    if length:
        written(lane, length)
    return lane


@pytest.mark.parametrize("seed", range(5))
def test_rows_keep_their_keys_while_others_come_and_go(seed):
    chance, lane = random.Random(seed), Lane(128)
    lane.join(one(0, 20, 128))
    for name in range(1, 60):
        action = chance.random()
        if action < 0.3:
            lane.join(one(name, chance.randint(1, 90), 192))
        elif action < 0.5 and len(lane.members) > 1:
            lane.remove(chance.choice(lane.members))
        for _ in range(chance.randint(0, 20)):
            for crowded in lane.crowded(1):
                if len(lane.members) > 1:
                    lane.remove(crowded)
            lane.shift(1)
            if lane.longest == lane.width:
                break
            written(lane)
        check(lane)
        rows = len(lane.members)
        assert all(len(held) <= max(2 * rows, rows * 3 // 2 + 1) for held in lane.keys.values())


def test_who_is_expected_finds_place():
    lane = one(1, 5, 128)
    lane.join(one(2, 3, 128), expected=3)
    held = dict(lane.keys)
    for name in (3, 4, 5):
        lane.join(one(name, name, 128))
    check(lane)
    assert all(lane.keys[layer] is held[layer] and len(held[layer]) == 5 for layer in held), "grown again"


def test_a_dropped_row_leaves_nothing_behind():
    lane = one(1, 5, 128)
    lane.join(one(2, 3, 128))
    lane.keys[0][0] = torch.nan
    lane.remove(1)
    assert lane.members == [2] and torch.isfinite(lane.keys[0]).all()
    check(lane)


def test_several_lanes_read_as_one_padded_batch():
    long, short = one(1, 7, 128), one(2, 4, 128)
    short.join(one(3, 2, 128))
    reading = Reading([long, short])
    assert reading.length == 7 and reading.start_B.tolist() == [0, 3, 5]
    new = torch.ones(3, K, 1, H)
    keys, _ = reading.update(0, new, new)
    assert keys.shape == (3, K, 8, H)
    assert torch.equal(keys[0, :, :7], long.keys[0][0, :, :7]) and torch.equal(keys[2, :, 5], key(3, 0, 0))
    assert (keys[:, :, 7] == 1).all() and (keys[1:, :, :3] == 0).all()


def test_widths_waste_at_most_a_third_beyond_the_room():
    for length in range(1, 5000, 7):
        width = width_for(length)
        assert length + 32 <= width and width % BLOCK == 0 and (width <= 128 or width * 2 / 3 < length + 32 + BLOCK)
    assert width_for(500, 512) == 512 and width_for(600, 512) == 640


def block(value):
    return {0: (torch.full((K, BLOCK, H), float(value)), torch.full((K, BLOCK, H), -float(value)))}


def text(*blocks):
    return [token for number in blocks for token in [number] * BLOCK]


def test_prefixes_are_found_as_far_as_they_agree():
    prefixes = Prefixes()
    prefixes.keep(text(1, 2, 3), block, lambda: True)
    assert len(prefixes) == 3
    assert [float(found[0][0].mean()) for found in prefixes.find([*text(1, 2, 4)])] == [0, 1]
    assert prefixes.find(text(2, 3)) == [] and prefixes.find(text(1)[:-1]) == []
    prefixes.keep([*text(1, 2, 5), 7, 7], lambda i: block(10 + i), lambda: True)
    assert len(prefixes) == 4 and [float(found[0][0].mean()) for found in prefixes.find(text(1, 2, 5))] == [0, 1, 12]


def test_the_oldest_block_goes_and_never_before_those_that_rest_on_it():
    chance, prefixes = random.Random(0), Prefixes()

    def room():
        while len(prefixes) >= 6:
            prefixes.drop_oldest()
        return True

    for _ in range(300):
        names = [chance.randint(1, 2) for _ in range(chance.randint(1, 5))]
        (prefixes.keep(text(*names), block, room) if chance.random() < 0.5 else prefixes.find(text(*names)))
        serials = {held.serial for held in prefixes._blocks.values()} | {0}
        assert all(before in serials for before, _ in prefixes._blocks) and len(prefixes) <= 6
    for names in ((1, 1), (3,), (4,), (5,), (6,)):
        prefixes.keep(text(*names), block, room)
    prefixes.find(text(1, 1))       # what is used becomes new
    for name in (7, 8):
        prefixes.keep(text(name), block, room)
    assert len(prefixes.find(text(1, 1))) == 2 and prefixes.find(text(3)) == prefixes.find(text(4)) == []
    assert len(prefixes.find(text(5))) == 1


def test_texts_whose_hashes_collide_are_not_confused():
    prefixes = Prefixes()
    assert hash((0, (-1,) * BLOCK)) == hash((0, (-2,) * BLOCK))    # Python's hash(-1) == hash(-2)
    prefixes.keep([-1] * BLOCK, block, lambda: True)
    assert prefixes.find([-2] * BLOCK) == [] and len(prefixes.find([-1] * BLOCK)) == 1


def test_guesses_continue_the_longest_latest_repetition():
    assert NGrams(3).guess([1, 2, 3, 4, 9, 9, 2, 3], 5) == [4, 9, 9]
    assert NGrams(8).guess([1, 2, 7, 5, 1, 2, 8, 1, 2], 8) == [8, 1, 2]
    assert NGrams(8).guess([5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2], 1) == [7]
    assert NGrams(8).guess([1, 2, 3, 4], 4) == [] and NGrams(8).guess([1], 4) == []


def test_wrong_guesses_become_shorter_and_right_ones_longer():
    grams = NGrams(8)
    grams.learn(8, 1)
    assert grams.ahead == 2
    grams.learn(2, 2)
    assert grams.ahead == 4
