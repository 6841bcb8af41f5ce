"""Moves that nobody asked for: never worse, never to and fro, within every bound; and what the core gains by them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from orchestrator.control import effects as do
from orchestrator.control.settings import CoreSettings
from orchestrator.domain.ids import Epoch, InstanceId, RequestId
from orchestrator.domain.instance import InstanceState
from orchestrator.domain.request import RequestState
from orchestrator.policy.load import Load, load_of
from orchestrator.policy.migration import RunningRequest
from orchestrator.policy.rebalance import (
    CEILING,
    Decision,
    Moving,
    Need,
    RebalanceRules,
    Why,
    balance_needs,
    plan_moves,
    room_needs,
    used_share,
)
from tests.support.core_world import CoreWorld, a_request, an_instance, capabilities

RULES = RebalanceRules(min_left_tokens=10)
SEEDS = 300


def running(name: str, instance: str, blocks: int, left: int = 100, **changes: object) -> RunningRequest:
    request = RunningRequest(
        RequestId(name), Epoch(1), InstanceId(instance), blocks * 16 - left, left_tokens=left, blocks=blocks, fingerprint="f"
    )
    return replace(request, **changes)


def loads_of(requests: list[RunningRequest], names: list[str], blocks: int = 64) -> dict[InstanceId, Load]:
    loads = {}
    for name in names:
        mine = [request.blocks for request in requests if request.instance == name]
        loads[InstanceId(name)] = load_of(
            an_instance(name, decodes=len(mine), decode_blocks=sum(mine), caps=capabilities(blocks=blocks))
        )
    return loads


def balance(requests: list[RunningRequest], names: list[str], rules: RebalanceRules = RULES) -> list[Decision]:
    loads = loads_of(requests, names)
    return plan_moves(balance_needs(loads.values(), rules.gap), loads, requests, {}, rules)


def carried_out(requests: list[RunningRequest], decisions: list[Decision]) -> list[RunningRequest]:
    places = {decision.request.request_id: decision.target.instance.instance_id for decision in decisions}
    return [
        replace(one, instance=places[one.request_id], moves=one.moves + 1) if one.request_id in places else one
        for one in requests
    ]


def random_requests(rng: random.Random, names: list[str]) -> list[RunningRequest]:
    requests: list[RunningRequest] = []
    for name in names:
        room = 64
        while room > 0 and rng.random() < 0.8 and sum(one.instance == name for one in requests) < 16:
            blocks = rng.randint(1, min(24, room))
            room -= blocks
            requests.append(
                running(
                    f"r{len(requests)}", name, blocks, left=rng.randint(1, 200), moves=rng.randint(0, 3),
                    is_moving=rng.random() < 0.1,
                )
            )  # fmt: skip
    return requests


@pytest.mark.parametrize("seed", range(SEEDS))
def test_balance_never_makes_it_worse_and_comes_to_rest(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"decode-{at}" for at in range(rng.randint(2, 5))]
    requests = random_requests(rng, names)
    seen = [tuple(one.instance for one in requests)]
    for _ in range(40):
        before = {name: used_share(load) for name, load in loads_of(requests, names).items()}
        decisions = balance(requests, names)
        if not decisions:
            break
        for one in decisions:
            assert one.why is Why.BALANCE and one.request.left_tokens >= 10 and one.request.moves < 3
            assert not one.request.is_moving and one.target.instance.instance_id != one.request.instance
        requests = carried_out(requests, decisions)
        after = {name: used_share(load) for name, load in loads_of(requests, names).items()}
        assert max(after.values()) <= max(before.values())
        assert sum(share**2 for share in after.values()) < sum(share**2 for share in before.values())
        assert all(after[name] <= max(CEILING, before[name]) for name in names)
        state = tuple(one.instance for one in requests)
        assert state not in seen, "to and fro"
        seen.append(state)
    else:
        raise AssertionError("it never comes to rest")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_room_is_made_completely_or_not_at_all(seed: int) -> None:
    rng = random.Random(1000 + seed)
    names = [f"decode-{at}" for at in range(rng.randint(2, 5))]
    requests = random_requests(rng, names)
    loads = loads_of(requests, names)
    waiting = a_request("big", prompt=rng.randint(1, 700), max_tokens=rng.randint(1, 300))
    needs = room_needs(loads.values(), waiting)
    blocks = -(-(waiting.prompt_tokens + waiting.max_tokens) // 16)
    free = {name: 64 - load.reserved_blocks for name, load in loads.items()}
    has_room = any(room >= blocks and loads[name].decode_requests < 16 for name, room in free.items())
    assert bool(needs) == (not has_room and blocks <= 64 and sum(free.values()) >= blocks)
    rules = replace(RULES, max_moves_per_instance=16)
    decisions = plan_moves(needs, loads, requests, {}, rules)
    if decisions:
        after = loads_of(carried_out(requests, decisions), names)
        assert all(load.reserved_blocks <= 64 and load.decode_requests <= 16 for load in after.values())
        source = decisions[0].request.instance
        assert {one.request.instance for one in decisions} == {source}
        assert after[source].reserved_blocks + blocks <= 64 and after[source].decode_requests < 16


@pytest.mark.parametrize("seed", range(100))
def test_no_instance_has_more_moves_than_allowed(seed: int) -> None:
    rng = random.Random(2000 + seed)
    names = [f"decode-{at}" for at in range(4)]
    requests = random_requests(rng, names)
    loads = loads_of(requests, names)
    del loads[InstanceId("decode-0")]  # it drains
    moving = {InstanceId(name): Moving(rng.randint(0, 4), rng.randint(0, 2)) for name in names}
    needs = [Need(Why.DRAIN, InstanceId("decode-0"), "it drains"), *balance_needs(loads.values(), 0.2)]
    decisions = plan_moves(needs, loads, requests, moving, RULES)
    for name in names:
        coming = sum(one.target.instance.instance_id == name for one in decisions)
        going = sum(one.request.instance == name for one in decisions)
        at = moving[InstanceId(name)]
        assert not coming or at.coming + coming <= RULES.max_moves_per_instance
        assert not going or at.going + going <= RULES.max_moves_per_instance
        assert name == "decode-0" or not going or not at.going, "a source of load is left alone until its moves are over"


def test_a_request_that_rests_or_ends_soon_or_was_moved_enough_stays() -> None:
    names = ["decode-0", "decode-1"]
    base = [running("a", "decode-0", 16), running("b", "decode-0", 16), running("c", "decode-0", 16)]
    assert len(balance(base, names)) == 1
    for changes in ({"left_tokens": 9}, {"moves": 3}, {"is_moving": True}):
        assert balance([replace(one, **changes) for one in base], names) == []
    loads = loads_of(base, names)
    resting = frozenset(one.request_id for one in base)
    assert plan_moves(balance_needs(loads.values(), 0.25), loads, base, {}, RULES, resting) == []


def test_nothing_goes_to_another_fingerprint() -> None:
    requests = [running("a", "decode-0", 20), running("b", "decode-0", 20)]
    loads = loads_of(requests, ["decode-0"])
    loads[InstanceId("decode-1")] = load_of(an_instance("decode-1", caps=capabilities(fingerprint="other")))
    assert balance_needs(loads.values(), 0.1) == []
    for why in (Why.DRAIN, Why.BALANCE, Why.PREEMPTING):
        assert plan_moves([Need(why, InstanceId("decode-0"), "")], loads, requests, {}, RULES) == []


# The core with the same policy, over a store in plain Python.


def a_world(enabled: bool) -> CoreWorld:
    rules = RebalanceRules(enabled=enabled, min_left_tokens=8, settle_s=0.2, cool_down_s=1.0)
    world = CoreWorld(settings=CoreSettings(rebalance=rules))
    world.add(an_instance("prefill-0", caps=capabilities(blocks=1024, running=256)))
    for at in range(3):
        world.add(an_instance(f"decode-{at}", caps=capabilities(blocks=64)))
    world.run(0.5)
    return world


def moves(effects: list[do.Effect]) -> list[do.Moved]:
    return [item for effect in effects if isinstance(effect, do.Migrate) for item in effect.items]


def queue_seconds(enabled: bool, seed: int) -> tuple[float, int]:
    """Seconds that all requests of one random load spent in the queue, and the moves.

    Each tenth of a second every request that decodes produces two tokens; most end long before their `max_tokens`.
    """
    rng = random.Random(seed)
    world = a_world(enabled)
    waited_s, moved, ends = 0.0, 0, {}
    for step in range(300):
        if step < 200 and rng.random() < 0.12:
            large = rng.random() < 0.2
            name, prompt = f"r{step}", rng.randint(560, 760) if large else rng.randint(20, 240)
            most = rng.randint(64, 240)
            world.submit(a_request(name, prompt, most))
            ends[name] = rng.randint(16, most)
        moved += len(moves(world.run(0.1)))
        for name, held in list(world.requests.items()):
            if held.state in (RequestState.ASSIGNED, RequestState.PREFILLING):
                world.hand_over(name)
            elif held.state is RequestState.DECODING:
                held.request = replace(held.request, output_tokens=held.request.output_tokens + 2)
                if held.request.output_tokens >= ends[name]:
                    world.finish(name)
            waited_s += 0.1 * (held.state is RequestState.QUEUED)
    return waited_s, moved


def test_requests_wait_less_with_it_than_without() -> None:
    with_it = [queue_seconds(True, seed) for seed in range(8)]
    without = [queue_seconds(False, seed) for seed in range(8)]
    assert sum(count for _, count in without) == 0 < sum(count for _, count in with_it)
    assert sum(waited for waited, _ in with_it) < 0.8 * sum(waited for waited, _ in without), (with_it, without)


def test_a_draining_instance_is_emptied_and_asked_again_while_others_are_full() -> None:
    world = a_world(enabled=False)
    for name in ("decode-1", "decode-2"):
        world.add(replace(world.instances[name], decode_requests=1, decode_blocks=60))
    world.submit(a_request("r", 100, 400))
    world.run(0.5)
    assert world.instances["decode-0"].decode_requests == 1
    world.hand_over("r")
    world.add(replace(world.instances["decode-0"], want_drain=True, state=InstanceState.DRAINING))
    assert moves(world.run(2.0)) == []
    world.add(replace(world.instances["decode-2"], decode_requests=0, decode_blocks=0))
    (move,) = moves(world.run(1.0))
    assert (move.request_id, move.source, move.target, move.why) == ("r", "decode-0", "decode-2", "drain")
    assert world.instances["decode-0"].decode_requests == 0


def test_an_instance_that_preempts_gives_one_request_away() -> None:
    world = a_world(enabled=True)
    for name in ("a", "b"):
        world.submit(a_request(name, 100, 28))
    world.run(0.3)
    for name in ("a", "b"):
        world.hand_over(name)
    world.run(1.0)
    source = world.requests["a"].assignment.decode
    world.add(replace(world.instances[source], preemptions=1))
    (move,) = moves(world.run(1.0))
    assert (move.request_id, move.source, move.why) == ("a", source, "preempting")
