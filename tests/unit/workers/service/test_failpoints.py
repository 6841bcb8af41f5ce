"""Failpoints fire where and when the spec says, and a spec with a typo is refused."""

from __future__ import annotations

import asyncio
import time

import pytest

from protos.contract.errors import ConfigError
from workers.service.failpoints import Failpoints


def passes(failpoints: Failpoints, point: str, count: int) -> list[bool]:
    slow = []
    for _ in range(count):
        started_s = time.monotonic()
        failpoints.reach_blocking(point)
        slow.append(time.monotonic() - started_s > 0.01)
    return slow


def test_the_nth_pass_fires_once() -> None:
    assert passes(Failpoints({"prefill.chunk#2": "sleep:0.02"}), "prefill.chunk", 4) == [False, True, False, False]


def test_without_a_number_every_pass_fires() -> None:
    assert passes(Failpoints({"prefill.chunk": "sleep:0.02"}), "prefill.chunk", 2) == [True, True]


def test_another_point_does_not_fire() -> None:
    assert passes(Failpoints({"prefill.chunk": "sleep:0.02"}), "decode.token", 2) == [False, False]


def test_an_index_counts_instead_of_the_passes() -> None:
    failpoints = Failpoints({"decode.token#5": "sleep:0.02"})
    slow = []
    for index in (5, 4, 5):
        started_s = time.monotonic()
        failpoints.reach_blocking("decode.token", index)
        slow.append(time.monotonic() - started_s > 0.01)
    assert slow == [True, False, True]


def test_a_hold_leaves_the_loop_alone() -> None:
    async def scenario() -> int:
        held = asyncio.create_task(Failpoints({"handoff.mid_push": "hold:0.05"}).reach("handoff.mid_push"))
        turns = 0
        while not held.done():
            turns += 1
            await asyncio.sleep(0.001)
        return turns

    assert asyncio.run(scenario()) > 5


def test_signals_fire_in_the_first_incarnation_only() -> None:
    failpoints = Failpoints({"emit.before_send": "kill"})
    failpoints.now_incarnation(2)
    failpoints.reach_blocking("emit.before_send")  # the test process is alive after this


@pytest.mark.parametrize(
    "spec",
    [{"nowhere": "kill"}, {"prefill.chunk#x": "kill"}, {"prefill.chunk": "explode"}, {"prefill.chunk": "sleep:-1"},
     {"prefill.chunk": "sleep:nan"}, {"prefill.chunk": "sleep:"}],
)  # fmt: skip
def test_a_typo_is_refused(spec: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        Failpoints(spec)
