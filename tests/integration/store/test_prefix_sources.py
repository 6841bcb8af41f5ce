"""Who lends cached blocks to a prefill: what assign writes down and what both sides are told; and the prompts of the queue."""

from __future__ import annotations

import pytest

from protos.contract.redis_names import Fn
from tests.support.store_world import Entry, World

SOURCE = ("s", 1, 7, 250, b"pushes")


@pytest.fixture
def three(world: World) -> World:
    """An instance for each part, and a queued request."""
    for name in ("p", "d", "s"):
        world.instance(name)
    world.queued()
    return world


def one(world: World, name: str, kind: str) -> Entry:
    (entry,) = [entry for entry in world.pick(name) if entry.kind == kind]
    return entry


def source_of(entry: Entry) -> tuple[str, str, str, str]:
    return entry.source_inst, entry.source_inc, entry.source_blocks, entry.source_wait_ms


def test_both_sides_are_told(three: World) -> None:
    assert three.assign("r", "p", "d", source=SOURCE) == ["OK", "1"]
    lend = one(three, "s", "lend")
    assert (lend.id, lend.epoch, lend.peer_inst, lend.peer_addr, lend.peer_inc) == ("r", 1, "p", "addr:p", "1")
    assert lend.spec == "spec-r" and lend.capability in ("pushes", b"pushes")
    assert source_of(lend) == ("s", "1", "7", "250")
    assert source_of(one(three, "p", "prefill")) == ("s", "1", "7", "250")
    assert source_of(one(three, "d", "expect")) == ("", "", "", "")
    assert three.view()["instances"]["s"]["d_blocks"] == 0, "a lender is charged nothing"


def test_a_source_that_decodes_it_too_is_told_both(three: World) -> None:
    three.assign("r", "p", "d", source=("d", 1, 7, 250, b""))
    assert [kind for kind, _, _ in three.told("d")] == ["expect", "lend"]


@pytest.mark.parametrize("source", [("s", 2, 7, 250, b""), ("nobody", 1, 7, 250, b""), ("p", 1, 7, 250, b"")])
def test_a_source_that_cannot_lend_is_left_out(three: World, source: tuple[str | int | bytes, ...]) -> None:
    assert three.assign("r", "p", "d", source=source) == ["OK", "1"]
    assert source_of(one(three, "p", "prefill")) == ("", "", "", "")
    assert three.told("s") == []


def test_nothing_is_lent_to_a_request_that_went_on(three: World) -> None:
    three.assign("r", "p", "d", source=SOURCE)
    three.pick("p")
    assert three.told("s") == [("lend", "r", 1)], "told again until it is acknowledged"
    assert three.handoff("r", 1, "d") == ["OK", "DECODING"]
    assert three.told("s") == []


def test_a_second_placement_has_a_source_of_its_own(three: World) -> None:
    three.assign("r", "p", "d", source=SOURCE)
    three.fail("r", 1, "p") if three.pick("p") else None
    assert three.state("r") == "QUEUED"
    assert three.told("s") == []
    assert three.assign("r", "p", "d", epoch=1) == ["OK", "2"]
    assert three.told("s") == [] and source_of(one(three, "p", "prefill")) == ("", "", "", "")


def test_prompts_of_queued_requests_only(three: World) -> None:
    assert three.call(Fn.PROMPTS, 2, "r", "x") == ["OK", "spec-r", "", "", ""]
    three.assign("r", "p", "d")
    assert three.call(Fn.PROMPTS, 1, "r") == ["OK", "", ""]
