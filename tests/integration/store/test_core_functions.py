"""autan_lead, view, assign, reap, drain, stats, requests: every reply and every guard."""

from __future__ import annotations

import re

import pytest
import redis

from orchestrator.domain.request import REQUEST_MOVES, TERMINAL_STATES
from orchestrator.store.library import library_text
from protos.contract.redis_names import Fn
from tests.support.store_world import LEADER, LONG_MS, NO_SOURCE, World


def test_the_library_and_the_domain_have_the_same_lifecycle() -> None:
    table = re.search(r"local MOVES = \{\n(.*?)\n\}", library_text(), re.S)
    assert table
    moves = {
        (state, target)
        for state, targets in re.findall(r"(\w+) = \{(.*?)\}", table[1])
        for target in re.findall(r"(\w+) = true", targets)
    }
    assert moves == {(state.value, target.value) for (state, _), target in REQUEST_MOVES.items()}
    assert not {state for state, _ in moves} & {state.value for state in TERMINAL_STATES}


def test_one_leader_at_a_time_under_growing_epochs(world: World) -> None:
    def lead(who: str, ttl_ms: int, epoch: int) -> tuple[int, bool]:
        reply = world.call(Fn.LEAD, who, ttl_ms, epoch)
        return int(reply[1]), reply[2] == 1

    assert lead(LEADER, LONG_MS, 1) == (1, True)
    assert lead("other", LONG_MS, 0) == (1, False)
    assert lead("other", LONG_MS, 1) == (1, False)
    assert lead(LEADER, 0, 1) == (1, True)
    assert lead(LEADER, 0, 1) == (1, True), "an ended lease that nobody took can be renewed"
    assert lead("other", LONG_MS, 0) == (2, True)
    assert lead(LEADER, LONG_MS, 1) == (2, False)
    assert lead("other", LONG_MS, 0) == (3, True), "a leader that forgot its epoch gets a new one"
    assert lead("other", LONG_MS, 2) == (3, False)


def test_a_former_leader_decides_nothing(world: World) -> None:
    world.instance("a")
    world.queued("r", timeout_ms=0)
    world.call(Fn.LEAD, LEADER, 0, 1)
    world.call(Fn.LEAD, "other", LONG_MS, 0)
    assert world.call(Fn.ASSIGN, LEADER, 1, LONG_MS, 1, "r", 0, "a", 1, "a", 1, 1, 1, b"", *NO_SOURCE) == ["NOT_LEADER"]
    assert world.call(Fn.ASSIGN, "other", 1, LONG_MS, 1, "r", 0, "a", 1, "a", 1, 1, 1, b"", *NO_SOURCE) == ["NOT_LEADER"]
    assert world.call(Fn.REAP, LEADER, 1, 10, 3, 0, LONG_MS) == ["NOT_LEADER"]
    assert world.state("r") == "QUEUED"


def test_view_is_one_picture(world: World) -> None:
    for name in ("p", "d"):
        world.instance(name)
    world.queued("first", prompt=100, max=5, prio=0)
    world.assigned("second", prompt=30)
    world.call(Fn.DRAIN, "d", 1)
    reply = world.call(Fn.VIEW, 10)
    assert reply[0] == "OK" and reply[2:4] == [1, 1]
    fields = reply[4:15]
    assert fields[:6] == ["first", "0", "100", "5", 0, "0"]
    assert int(fields[7]) - int(fields[6]) == LONG_MS
    assert fields[8:] == ["acme", "m", "0"]
    assert reply[15] == 2
    d, p = reply[16:32], reply[32:48]
    assert d[:5] == ["d", "combined", "addr:d", "1", "READY"] and d[6] == "1"
    assert d[7:] == ["0", "0", "0", "1", "3", "0", "0", "card-d", "stats"]
    assert p[6:] == ["0", "1", "30", "2", "0", "0", "0", "0", "card-p", "stats"]
    assert len(reply) == 48
    assert world.call(Fn.VIEW, 0)[2:4] == [1, 0]


def test_assign_places_charges_and_tells_both(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.queued("r")
    assert world.assign("r", "p", "d") == ["OK", "1"]
    assert world.look("r")[:2] == ["ASSIGNED", "1"]
    view = world.view()
    assert view["queue"] == []
    assert view["instances"]["p"] == {
        "p_requests": 1, "p_tokens": 10, "p_blocks": 2, "d_requests": 0, "d_blocks": 0, "state": "READY",
    }  # fmt: skip
    assert view["instances"]["d"]["d_requests"] == 1 and view["instances"]["d"]["d_blocks"] == 3
    (prefill,) = world.pick("p")
    (expect,) = world.pick("d")
    assert (prefill.kind, prefill.peer_inst, prefill.peer_addr, prefill.peer_inc) == ("prefill", "d", "addr:d", "1")
    assert (expect.kind, expect.peer_inst, expect.peer_addr, expect.peer_inc) == ("expect", "p", "addr:p", "1")
    for entry in (prefill, expect):
        assert (entry.spec, entry.ingress_id, entry.ingress_addr, entry.ingress_epoch) == ("spec-r", "g0", "addr:g0", "1")


def test_assign_to_one_instance_sends_one_message_to_itself(world: World) -> None:
    world.instance("c")
    world.queued("r")
    assert world.assign("r", "c", "c") == ["OK", "1"]
    (entry,) = world.pick("c")
    assert (entry.kind, entry.peer_inst, entry.peer_addr) == ("prefill", "c", "addr:c")
    assert world.handoff("r", 1, "c") == ["OK", "DECODING"]
    load = world.view()["instances"]["c"]
    assert (load["p_requests"], load["p_blocks"], load["d_requests"], load["d_blocks"]) == (0, 0, 1, 3)


def test_assign_refuses_what_changed_since_the_view(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.queued("r")
    assert world.assign("nobody", "p", "d") == ["GONE", "0"]
    assert world.assign("r", "p", "d", epoch=1) == ["STALE", "0"]
    assert world.assign("r", "missing", "d") == ["STALE", "0"]
    assert world.assign("r", "p", "d", p_inc=2) == ["STALE", "0"]
    assert world.assign("r", "p", "d", d_inc=2) == ["STALE", "0"]
    assert world.assign("r", "p", "d") == ["OK", "1"]
    assert world.assign("r", "p", "d") == ["STALE", "1"], "the same decision twice"
    assert world.assign("r", "p", "d", epoch=1) == ["STATE", "1"]
    world.cancel("r")
    assert world.assign("r", "p", "d", epoch=2) == ["STATE", "2"]


def test_assign_reaches_only_ready_instances_that_are_not_asked_to_drain(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.queued("r")
    world.call(Fn.REGISTER, "new", "decode", "addr:new", "card")
    assert world.assign("r", "p", "new") == ["STALE", "0"], "STARTING"
    world.renew("d", state="DRAINING")
    assert world.assign("r", "p", "d") == ["STALE", "0"], "DRAINING"
    world.renew("d")
    world.call(Fn.DRAIN, "d", 1)
    assert world.assign("r", "p", "d") == ["STALE", "0"], "asked to drain"
    world.call(Fn.DRAIN, "d", 0)
    world.silence("d")
    world.reap(lost_ms=1000)
    assert world.assign("r", "p", "d") == ["STALE", "0"], "LOST"
    world.call(Fn.DEREGISTER, "p", 1)
    assert world.assign("r", "p", "p") == ["STALE", "0"], "STOPPED"
    assert world.state("r") == "QUEUED"


def test_assign_takes_a_batch_request_by_request(world: World) -> None:
    world.instance("c")
    for id in ("a", "b"):
        world.queued(id)
    flat: list[str | bytes | int] = [value for id in "axb" for value in (id, 0, "c", 1, "c", 1, 1, 1, b"", *NO_SOURCE)]
    assert world.call(Fn.ASSIGN, LEADER, 1, LONG_MS, 3, *flat) == ["OK", "OK", "1", "GONE", "0", "OK", "1"]
    with pytest.raises(redis.ResponseError, match="k is no integer from 0 to 64"):
        world.call(Fn.ASSIGN, LEADER, 1, LONG_MS, 65)


def test_reap_requeues_lapsed_leases_and_counts_only_held_ones(world: World) -> None:
    for name in "pd":
        world.instance(name)
    for reach in (world.prefilling, world.decoding, world.assigned):
        reach(reach.__name__)
        world.lapse(reach.__name__)
    outcomes, lost = world.reap()
    assert outcomes == dict.fromkeys(("assigned", "prefilling", "decoding"), "QUEUED") and lost == []
    attempts = {entry[0]: entry[9] for entry in requests(world)}
    assert attempts == {"assigned": "0", "prefilling": "1", "decoding": "1"}
    assert {told for told in world.told("p") if told[0] == "revoke"} == {
        ("revoke", "assigned", 1), ("revoke", "prefilling", 1), ("revoke", "decoding", 1),
    }  # fmt: skip
    assert world.look("decoding")[:3] == ["QUEUED", "1", 1], "the journal stays"
    assert world.reap() == ({}, [])


def requests(world: World) -> list[list[str]]:
    """The entries of autan_requests."""
    reply = world.call(Fn.REQUESTS, 1000, "all", "", 0, "")
    return [reply[3 + 16 * i : 19 + 16 * i] for i in range(reply[2])]


def test_a_lease_of_no_time_lapses_at_once(world: World) -> None:
    world.instance("c")
    world.queued("r")
    world.assign("r", "c", "c", lease_ms=0)
    assert world.reap()[0] == {"r": "QUEUED"}


def test_a_requeued_request_keeps_its_place(world: World) -> None:
    world.instance("c")
    for id in ("first", "second", "third"):
        world.queued(id)
    world.assign("second", "c", "c")
    world.lapse("second")
    world.reap()
    assert world.view()["queue"] == ["first", "second", "third"]


def test_the_last_attempt_makes_a_request_dead(world: World) -> None:
    world.instance("c")
    world.queued("r")
    for attempt in (1, 2, 3):
        assert world.assign("r", "c", "c", epoch=attempt - 1) == ["OK", str(attempt)]
        assert world.read("c")[-1] == ("prefill", "r", attempt)
        world.lapse("r")
        assert world.reap(max_attempts=3)[0] == {"r": "QUEUED" if attempt < 3 else "DEAD"}
    assert world.look("r")[:4] == ["DEAD", "3", 0, "poison"]
    assert 0 < world.redis.pttl(f"{world.base}:r:r") <= LONG_MS


def test_reap_expires_every_live_state(world: World) -> None:
    for name in "pd":
        world.instance(name)
    for reach in (world.queued, world.prefilling, world.decoding, world.assigned):
        reach(reach.__name__)
        world.expire(reach.__name__)
    world.queued("patient")
    outcomes, _ = world.reap()
    assert outcomes == dict.fromkeys(("queued", "assigned", "prefilling", "decoding"), "EXPIRED")
    assert world.look("decoding")[:4] == ["EXPIRED", "1", 1, "deadline"]
    assert ("revoke", "decoding", 1) in world.told("d")
    assert world.state("patient") == "QUEUED"


def test_reap_declares_silent_instances_lost_and_requeues_their_parts(world: World) -> None:
    for name in ("p", "d", "other"):
        world.instance(name)
    world.prefilling("at-p")
    world.decoding("at-d")
    world.decoding("elsewhere", "p", "other")
    world.silence("d")
    outcomes, lost = world.reap(lost_ms=1000)
    assert lost == ["d"]
    assert outcomes == {"at-p": "QUEUED", "at-d": "QUEUED"}
    attempts = {entry[0]: entry[9] for entry in requests(world)}
    assert attempts == {"at-p": "0", "at-d": "1", "elsewhere": "0"}, "only the holder's death counts"
    assert ("revoke", "at-p", 1) in world.told("p")
    assert world.call(Fn.PICK, "d", 1, 0, 64, LONG_MS) == ["STALE"]
    assert world.renew("d")[0] == "STALE"
    assert world.view()["instances"]["d"] == {
        "p_requests": 0, "p_tokens": 0, "p_blocks": 0, "d_requests": 0, "d_blocks": 0, "state": "LOST",
    }  # fmt: skip
    assert world.reap(lost_ms=1000) == ({}, [])


def test_reap_is_bounded_and_continues(world: World) -> None:
    world.instance("c")
    ids = [f"r{i}" for i in range(7)]
    for id in ids:
        world.queued(id)
        world.assign(id, "c", "c")
    world.silence("c")
    seen: dict[str, str] = {}
    sizes = []
    for _ in range(4):
        outcomes, _ = world.reap(limit=3, lost_ms=1000)
        sizes.append(len(outcomes))
        seen |= outcomes
    assert sizes == [3, 3, 1, 0]
    assert set(seen) == set(ids)
    assert world.view()["queue"] == ids
    assert world.reap(limit=0) == ({}, [])


def test_a_beat_from_the_future_counts_as_now(world: World) -> None:
    world.instance("c")
    world.redis.hset(f"{world.base}:i:c", "beat_ms", 1 << 52)
    assert world.reap(lost_ms=1000) == ({}, [])
    assert int(world.redis.hget(f"{world.base}:i:c", "beat_ms")) < 1 << 51


def test_drain_is_told_with_the_renewal_and_ends_with_the_stop(world: World) -> None:
    assert world.call(Fn.DRAIN, "nobody", 1) == ["GONE"]
    world.instance("c")
    for _ in range(2):
        assert world.call(Fn.DRAIN, "c", 1) == ["OK"]
        assert world.renew("c")[2] == "1"
    assert world.instance("c") == 2
    assert world.renew("c", 2)[2] == "1", "a crash does not undo the operator's wish"
    world.call(Fn.DEREGISTER, "c", 2)
    world.instance("c")
    assert world.renew("c", 3)[2] == "0", "a drain that was carried out is over"


def test_stats_count_each_end_once(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.queued("cancelled")
    world.cancel("cancelled")
    world.cancel("cancelled")
    world.decoding("done")
    world.finish("done", 1, 1)
    world.finish("done", 1, 1)
    world.prefilling("failed")
    world.fail("failed", 1, "p", retryable=False)
    world.queued("expired")
    world.expire("expired")
    world.reap()
    world.queued("live")
    world.emit("live", 9, 0, 1)
    reply = world.call(Fn.STATS)[1:]
    stats = dict(zip(reply[::2], reply[1::2], strict=True))
    expected = {"submitted": "5", "done": "1", "cancelled": "1", "failed": "1", "expired": "1", "dead": "0", "handed_over": "1"}
    assert {name: stats[name] for name in expected} == expected
    assert (stats["queued"], stats["live"], stats["leader"], stats["leader_epoch"]) == (1, 1, LEADER, "1")
    assert int(stats["stale_refused"]) == 1
    assert int(stats["memory_bytes"]) > 0 and int(stats["max_memory_bytes"]) == 512 * 1024 * 1024
    assert abs(int(stats["generation"]) - int(stats["now_ms"])) < 60_000


def test_requests_lists_live_ones_oldest_first(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.decoding("old")
    world.redis.zadd(f"{world.base}:live", {"old": 1})
    world.queued("new")
    world.queued("gone")
    world.cancel("gone")
    old, new = requests(world)
    assert old[:8] == ["old", "acme", "DECODING", "1", "10", 1, "p", "d"]
    assert new[:8] == ["new", "acme", "QUEUED", "0", "10", 0, "", ""]
    assert world.call(Fn.REQUESTS, 1, "all", "", 0, "")[2:4] == [1, "old"]


def test_the_death_of_the_holder_counts_whoever_else_died(world: World) -> None:
    for name in ("p", "d"):
        world.instance(name)
    ids = [f"r{i}" for i in range(8)]
    for id in ids:
        world.prefilling(id)
    for name in ("d", "p"):
        world.silence(name)
    assert world.reap(lost_ms=1000)[0] == dict.fromkeys(ids, "QUEUED")
    assert {entry[9] for entry in requests(world)} == {"1"}
