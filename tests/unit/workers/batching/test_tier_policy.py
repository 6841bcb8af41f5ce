"""Decisions of tiers: fits, thresholds, and the order in which blocks go, beside slow twins on seeded inputs."""

from __future__ import annotations

import random

import pytest

from workers.batching.tier_policy import MAX_FREQUENCY, PrefillCost, Retention, ReuseRate, worth_reading, worth_writing


def test_the_cost_of_prefill_is_found_again() -> None:
    rng, cost = random.Random(1), PrefillCost()
    assert cost.block_s(3, 64) == float("inf")
    for _ in range(50):
        rows, start = rng.randrange(1, 512), rng.randrange(0, 8000)
        positions = rows * (start + rows / 2)
        cost.observe(rows, positions, 2e-4 * rows + 3e-8 * positions)
    assert cost.coefficients() == pytest.approx((2e-4, 3e-8))
    assert cost.block_s(10, 64) == pytest.approx(64 * (2e-4 + 3e-8 * 64 * 10.5))


def test_a_block_is_written_only_while_it_pays() -> None:
    reuse = ReuseRate()
    assert worth_writing(reuse.of(1), 0.03, 0.003, 0.003)
    for _ in range(50):
        reuse.ended(1, read=False)
    assert not worth_writing(reuse.of(1), 0.03, 0.003, 0.003), "scans are not written for ever"
    assert worth_writing(reuse.of(2), 0.03, 0.003, 0.003), "what several prompts used is another matter"
    assert not worth_writing(1.0, 0.003, 0.03, 0.0), "what is slower to read than to compute is never written"


@pytest.mark.parametrize("seed", range(50))
def test_the_run_that_saves_most_is_read(seed: int) -> None:
    rng = random.Random(seed)
    compute = [rng.uniform(0.01, 0.1) for _ in range(rng.randrange(12))]
    read = [rng.uniform(0.01, 0.1) for _ in compute]
    queued = rng.uniform(0.0, 0.2)
    savings = [0.0] + [sum(compute[:n]) - sum(read[:n]) - queued for n in range(1, len(compute) + 1)]
    count = worth_reading(compute, read, queued)
    assert savings[count] == pytest.approx(max(savings))


@pytest.mark.parametrize("seed", range(20))
def test_the_order_is_that_of_the_slow_twin(seed: int) -> None:
    rng = random.Random(seed)
    order = Retention(6, lambda depth: 1 + depth / 4)
    rank: dict[bytes, float] = {}
    place: dict[bytes, tuple[bytes, int]] = {}
    uses: dict[bytes, int] = {}
    floor = 0.0
    for _ in range(400):
        chain, parent = rng.randrange(5), b"root"
        for depth in range(rng.randrange(1, 5)):
            name = bytes([chain, depth])
            uses[name] = uses.get(name, 0) + 1
            if name in order:
                order.touch(name)
            else:
                order.add(name, parent, depth)
                place[name] = (parent, depth)
            uses[name] = order.frequency(name)
            rank[name] = floor + min(uses[name], MAX_FREQUENCY) * (1 + depth / 4)
            parent = name
        order.check_integrity()
        while len(order) > 6:
            parents = {place[name][0] for name in rank}
            leaves = [name for name in rank if name not in parents]
            victim = order.victim(lambda name: False)
            assert victim in leaves, "a parent never goes before what builds on it"
            assert rank[victim] == min(rank[name] for name in leaves)
            floor = max(floor, rank.pop(victim))
            order.remove(victim)
