"""The prefix cache: runs, first block wins, events without gaps."""

from __future__ import annotations

import pytest

from workers.batching import prefix_cache
from workers.batching.prefix_cache import PrefixCache
from workers.engine_api.types import CacheEvent

NAMES = [bytes([n]) * 16 for n in range(8)]
ROOT = b"r" * 16


def test_match_is_the_known_run_from_the_start() -> None:
    cache = PrefixCache()
    assert cache.store(ROOT, NAMES[:3], [7, 8, 9]) == [7, 8, 9]
    assert cache.match(NAMES) == [7, 8, 9]
    assert cache.match(NAMES[:2]) == [7, 8]
    assert cache.match(NAMES[1:]) == [8, 9]
    assert cache.match(NAMES[3:]) == []
    cache.drop(8)
    assert cache.match(NAMES) == [7], "what is behind a hole cannot be reached"
    cache.check_integrity()


def test_the_first_block_of_a_name_stays() -> None:
    cache = PrefixCache()
    cache.store(ROOT, NAMES[:2], [1, 2])
    assert cache.store(ROOT, NAMES[:4], [5, 6, 7, 8]) == [7, 8]
    assert cache.match(NAMES[:4]) == [1, 2, 7, 8]
    assert cache.blocks() == {1, 2, 7, 8}


def test_a_block_has_one_name() -> None:
    cache = PrefixCache()
    cache.store(ROOT, NAMES[:1], [1])
    with pytest.raises(AssertionError):
        cache.store(ROOT, NAMES[1:2], [1])


def test_events_name_parents_and_have_no_gaps() -> None:
    cache = PrefixCache()
    cache.store(ROOT, NAMES[:2], [0, 1])
    cache.store(NAMES[1], NAMES[2:5], [2, 3, 4])
    cache.drop(3)
    cache.drop(4)
    cache.store(NAMES[1], NAMES[2:4], [5, 3])
    cache.drop(0)
    assert cache.drain_events() == (
        CacheEvent(1, stored=(NAMES[0], NAMES[1]), parent=ROOT),
        CacheEvent(2, stored=(NAMES[2], NAMES[3], NAMES[4]), parent=NAMES[1]),
        CacheEvent(3, removed=(NAMES[3], NAMES[4])),
        CacheEvent(4, stored=(NAMES[3],), parent=NAMES[2]),
        CacheEvent(5, removed=(NAMES[0],)),
    )
    assert cache.drain_events() == ()


def test_undrained_events_are_bounded_and_the_loss_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MAX_PENDING_EVENTS", 3)
    cache = PrefixCache()
    for index, name in enumerate(NAMES):
        cache.store(ROOT, [name], [index])
    assert [event.sequence for event in cache.drain_events()] == [6, 7, 8]
