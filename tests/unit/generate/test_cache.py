import torch

from dougong.generate.cache import KVCache


def filled(rows, length, *, start=None, layers=2, pieces=(5,)):
    """A cache whose key at (row, position) is recognisable, filled in several pieces."""
    cache = KVCache(start_B=None if start is None else torch.tensor(start))
    keys = torch.arange(rows * length).view(rows, 1, length, 1).float() * torch.ones(1, 2, 1, 3)
    at = 0
    for size in [*pieces, length - sum(pieces)]:
        for layer in range(layers):
            read = cache.update(layer, keys[:, :, at:at + size] + layer, -keys[:, :, at:at + size])
        at += size
        cache.advance(size)
    return cache, keys, read


def test_update_returns_everything_read_so_far():
    cache, keys, (k, v) = filled(2, 9)
    assert cache.length == 9
    assert torch.equal(k, keys + 1) and torch.equal(v, -keys)


def test_growing_by_single_tokens_keeps_what_was_read():
    cache, keys, (k, v) = filled(1, 700, pieces=(3, *[1] * 690))
    assert torch.equal(k, keys + 1) and torch.equal(v, -keys)
    assert cache.nbytes <= 2 * 2 * 2 * 700 * 3 * 4 * 2


def test_reserved_slots_are_allocated_once():
    cache = KVCache(reserve=64)
    store = cache.update(0, torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))[0].data_ptr()
    cache.advance(4)
    for _ in range(60):
        assert cache.update(0, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))[0].data_ptr() == store
        cache.advance(1)


def test_kept_rows_come_in_the_asked_order_and_may_repeat():
    cache, keys, _ = filled(3, 6)
    cache.keep([2, 0, 2])
    k, v = cache.update(0, torch.full((3, 2, 1, 3), 99.0), torch.full((3, 2, 1, 3), 98.0))
    assert torch.equal(k[:, :, :6], keys[[2, 0, 2]]) and torch.equal(v[:, :, :6], -keys[[2, 0, 2]])
    assert (k[:, :, 6] == 99).all() and (v[:, :, 6] == 98).all()


def test_columns_that_only_pad_are_dropped_with_their_rows():
    cache, keys, _ = filled(3, 8, start=[0, 3, 5])
    cache.keep([1, 2])
    assert cache.length == 5 and cache.start_B.tolist() == [0, 2]
    assert torch.equal(cache.update(0, keys[1:, :, :1], keys[1:, :, :1])[0][:, :, :5], keys[1:, :, 3:])
    cache.keep([1])
    assert cache.length == 3 and cache.start_B is None


def test_without_padding_no_mask_is_asked_for():
    assert KVCache(start_B=torch.tensor([0, 0])).start_B is None
