from __future__ import annotations

import numpy as np
import pytest
import torch

from protos.contract.errors import BadFrame
from workers.engine_api.types import KvLayout
from workers.engines.torch.kv_cache import KvCache

LAYOUT = KvLayout(block_tokens=4, num_layers=5, row_bytes=12, dtype="float32", name="test", target_group_bytes=2 * 48)


@pytest.fixture
def cache() -> KvCache:
    return KvCache(LAYOUT, 6, torch.float32, torch.device("cpu"))


def test_bytes_of_a_block_are_layers_of_tokens_of_rows(cache: KvCache) -> None:
    """What the layout promises, checked against rows stored through a scattered table."""
    index = torch.from_numpy(cache.slots_of((5, 2), np.arange(7)))
    table = torch.tensor([5, 2], dtype=torch.int32)
    stored = torch.arange(5 * 7 * 3, dtype=torch.float32).view(5, 7, 3)
    for layer in range(5):
        cache.store(layer, index, stored[layer])
        assert torch.equal(cache.load(layer, table).flatten(0, 1)[:7], stored[layer])
    for logical, block in enumerate((5, 2)):
        raw = b"".join(cache.read(block, group) for group in range(LAYOUT.num_groups))
        assert len(raw) == LAYOUT.block_bytes
        seen = np.frombuffer(raw, dtype=np.float32).reshape(5, 4, 3)
        rows = min(4, 7 - 4 * logical)
        assert np.array_equal(seen[:, :rows], stored[:, 4 * logical : 4 * logical + rows].numpy())
        assert not seen[:, rows:].any()


def test_reading_is_a_view_and_writing_is_seen_by_layers(cache: KvCache) -> None:
    view = cache.read(3, 1)
    assert view.readonly
    cache.write(3, 1, 48, memoryview(np.full(12, 7, dtype=np.float32)))
    assert np.frombuffer(view, dtype=np.float32).tolist() == [0.0] * 12 + [7.0] * 12
    table = torch.tensor([3])
    assert cache.load(3, table).eq(7).all()
    assert not cache.load(2, table).any()


@pytest.mark.parametrize(
    ("block", "group", "offset", "size"),
    [(6, 0, 0, 1), (-1, 0, 0, 1), (0, 3, 0, 1), (0, -1, 0, 1), (0, 0, -1, 1), (0, 0, 96, 1), (0, 0, 1, 96), (0, 2, 0, 49)],
)
def test_writes_outside_a_group_are_refused_and_change_nothing(
    cache: KvCache, block: int, group: int, offset: int, size: int
) -> None:
    with pytest.raises(BadFrame):
        cache.write(block, group, offset, memoryview(b"\1" * size))
    assert not any(any(cache.read(known, part)) for known in range(6) for part in range(3))


def test_the_padding_block_stays_zero(cache: KvCache) -> None:
    every = torch.from_numpy(cache.slots_of(tuple(range(6)), np.arange(24)))
    for layer in range(5):
        cache.store(layer, every, torch.ones(24, 3))
        assert not cache.load(layer, torch.tensor([cache.num_blocks])).any()


def test_close_is_idempotent_and_leaves_views_readable(cache: KvCache) -> None:
    view = cache.read(0, 0)
    cache.close()
    cache.close()
    assert not any(view)
