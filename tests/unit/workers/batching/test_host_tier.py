"""Evicted blocks come back from the host's memory: right tokens, exact books, bounded, never across tenants."""

from __future__ import annotations

import random

import pytest

from tests.contract.driver import a_request, assert_empty, run
from workers.batching.engine_limits import EngineLimits
from workers.batching.host_tier import HostTier
from workers.batching.paged_engine import PagedEngine
from workers.engine_api.types import SamplingParams
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.reference import expected_tokens
from workers.engines.oracle.runner import OracleRunner

MODEL = OracleModel("tiers", num_layers=2, context_tokens=256)
SIZE = 4
SAMPLING = SamplingParams(max_tokens=3)


def make(num_blocks: int, host_blocks: int) -> PagedEngine:
    runner = OracleRunner(MODEL, num_blocks=num_blocks, block_tokens=SIZE)
    capacity = host_blocks * runner.layout.block_bytes
    return PagedEngine(runner, EngineLimits(max_batch_tokens=16, max_running=3, host_cache_bytes=capacity))


def prompt(seed: int, length: int = 21) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(3, 200) for _ in range(length))


def test_an_evicted_prompt_comes_back_without_being_computed() -> None:
    engine = make(num_blocks=8, host_blocks=32)
    for index, seed in enumerate((1, 2, 3)):
        run(engine, [a_request(f"a{index}", prompt(seed), sampling=SAMPLING)])
    computed = engine.stats().prefill_tokens
    output = run(engine, [a_request("again", prompt(1), sampling=SAMPLING)])["again"]
    assert output.tokens == expected_tokens(MODEL, prompt(1), SAMPLING)
    assert engine.stats().prefill_tokens - computed == 1, "five blocks of four come back, one token is left"
    assert engine.stats().host_restored_tokens > 0
    assert_empty(engine)


def test_another_tenant_gets_nothing_of_it() -> None:
    engine = make(num_blocks=8, host_blocks=32)
    for index, seed in enumerate((1, 2, 3)):
        run(engine, [a_request(f"a{index}", prompt(seed), sampling=SAMPLING, salt=b"one")])
    before = engine.stats()
    run(engine, [a_request("b", prompt(1), sampling=SAMPLING, salt=b"two")])
    after = engine.stats()
    assert (after.prefill_tokens - before.prefill_tokens, after.host_restored_tokens) == (21, before.host_restored_tokens)


def test_the_least_recently_used_block_goes_and_the_bound_holds() -> None:
    runner = OracleRunner(MODEL, num_blocks=4, block_tokens=SIZE)
    tier = HostTier(runner, 2 * runner.layout.block_bytes + 1)
    names = [bytes([n]) * 16 for n in range(4)]
    for block_id in range(2):
        runner.write_block(block_id, 0, 0, memoryview(bytes([block_id + 1]) * runner.layout.group_bytes(0)))
        tier.save(names[block_id], block_id)
    assert tier.load(names[0], 3)
    assert bytes(runner.read_block(3, 0)) == bytes([1]) * runner.layout.group_bytes(0)
    tier.save(names[2], 2)
    assert [tier.run([name]) for name in names] == [1, 0, 1, 0]
    assert not tier.load(names[1], 3)
    assert len(tier) == tier.capacity == 2


@pytest.mark.parametrize("host_blocks", [1, 3, 9, 40])
def test_random_traffic_stays_right_in_small_pools(host_blocks: int) -> None:
    rng = random.Random(host_blocks)
    engine = make(num_blocks=11, host_blocks=host_blocks)
    stored: set[bytes] = set()
    for turn in range(40):
        requests = [
            a_request(f"r{turn}.{i}", prompt(seed, rng.randrange(9, 29)), sampling=SAMPLING, salt=rng.choice([b"", b"x"]))
            for i, seed in enumerate(rng.choices(range(6), k=rng.randrange(1, 4)))
        ]
        outputs = run(engine, requests)
        for request in requests:
            assert outputs[request.request_id].tokens == expected_tokens(MODEL, request.prompt, SAMPLING)
        for event in engine.drain_cache_events():
            assert not stored & set(event.stored)
            assert stored >= set(event.removed)
            stored = (stored | set(event.stored)) - set(event.removed)
        assert_empty(engine)
        assert stored == engine.known_names(), "a name is told of while any tier has it"
        assert engine.stats().cached_blocks <= len(stored) == engine.stats().known_names
        assert engine.stats().host_blocks <= host_blocks
    if host_blocks >= 7:  # the longest prompt: a smaller cache may hold nothing but ends of prompts, which nobody reaches
        assert engine.stats().host_restored_tokens > 0
