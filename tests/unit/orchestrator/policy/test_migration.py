"""Which running requests leave an instance that drains, and where they go."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from orchestrator.domain.ids import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.domain.instance import Capabilities, InstanceState, InstanceView, Role
from orchestrator.policy.migration import RunningRequest, may_receive, plan_drain

ABLE = Capabilities(
    model="m", fingerprint="f", block_tokens=16, total_blocks=40, context_tokens=512, max_batch_tokens=64, max_running=3
)


def view(name: str, **changes: object) -> InstanceView:
    base = InstanceView(
        instance_id=InstanceId(name), role=Role.DECODE, address="a", incarnation=Incarnation(7), state=InstanceState.READY,
        beat_ms=0, want_drain=False, prefill_requests=0, prefill_tokens=0, prefill_blocks=0, decode_requests=0,
        decode_blocks=0, capabilities=ABLE,
    )  # fmt: skip
    return replace(base, **changes)


def request(name: str, tokens: int, instance: str = "d0") -> RunningRequest:
    return RunningRequest(RequestId(name), Epoch(4), InstanceId(instance), tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"role": Role.PREFILL},
        {"state": InstanceState.DRAINING},
        {"want_drain": True},
        {"capabilities": None},
        {"capabilities": replace(ABLE, fingerprint="other")},
    ],
)
def test_who_may_not_receive(changes: dict[str, object]) -> None:
    assert may_receive(view("d0", want_drain=True), view("d1"))
    assert not may_receive(view("d0"), view("d1", **changes))
    assert not may_receive(view("d0"), view("d0"))
    assert plan_drain(view("d0"), [view("d1", **changes)], [request("r", 20)]) == []


def test_the_emptiest_target_first_and_smallest_requests_first() -> None:
    targets = [view("d1", decode_blocks=10), view("d2")]
    running = [request("big", 100), request("small", 20), request("elsewhere", 5, "d1")]
    moves = plan_drain(view("d0"), targets, running)
    assert [(one.request_id, one.target, one.blocks, one.incarnation, one.epoch) for one in moves] == [
        ("small", "d2", 3, 7, 4),
        ("big", "d2", 8, 7, 4),
    ]


def test_no_target_is_overbooked() -> None:
    rng = random.Random(3)
    for _ in range(200):
        targets = [
            view(f"d{at}", decode_requests=rng.randrange(4), decode_blocks=rng.randrange(41))
            for at in range(1, rng.randint(2, 4))
        ]
        running = [request(f"r{at}", rng.randrange(1, 400)) for at in range(rng.randrange(8))]
        moves = plan_drain(view("d0"), targets, running)
        assert len({one.request_id for one in moves}) == len(moves)
        left = {one.request_id: one for one in running}
        for target in targets:
            mine = [one for one in moves if one.target == target.instance_id]
            if mine:
                assert target.reserved_blocks + sum(one.blocks for one in mine) <= ABLE.total_blocks
                assert target.decode_requests + len(mine) <= ABLE.max_running
            assert all(one.blocks * ABLE.block_tokens > left[one.request_id].tokens for one in mine)
