"""autan_register, deregister, pick, renew, handoff, fail: every reply and every guard."""

from __future__ import annotations

import pytest
import redis

from protos.contract.redis_names import Fn, pack_tokens
from tests.support.store_world import LEADER, LONG_MS, World


def test_incarnations_grow_for_ever(world: World) -> None:
    assert world.call(Fn.REGISTER, "w", "decode", "a", "card")[:2] == ["OK", "1"]
    assert world.call(Fn.REGISTER, "w", "decode", "a", "card")[:2] == ["OK", "2"]
    assert world.call(Fn.DEREGISTER, "w", 2) == ["OK"]
    assert world.call(Fn.REGISTER, "w", "decode", "a", "card")[:2] == ["OK", "3"]
    world.silence("w")
    assert world.reap(lost_ms=1000)[1] == ["w"]
    assert world.call(Fn.REGISTER, "w", "decode", "a", "card")[:2] == ["OK", "4"]
    with pytest.raises(redis.ResponseError, match="role has an unknown value"):
        world.call(Fn.REGISTER, "w", "cook", "a", "card")


def test_a_new_incarnation_fences_the_old_one_and_its_work_is_queued_again(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.decoding("held")
    world.prefilling("expected")
    assert world.instance("d") == 2
    assert world.call(Fn.PICK, "d", 1, 0, 64, LONG_MS) == ["STALE"]
    assert world.renew("d", 1)[0] == "STALE"
    assert world.handoff("expected", 1, "d", 1)[0] == "STALE"
    assert world.handoff("expected", 1, "d", 2)[0] == "STALE", "assigned to its former self"
    assert world.fail("held", 1, "d", 1) == ["STALE"]
    assert world.told("d", 2) == [], "the inbox starts empty"
    assert world.reap()[0] == {"held": "QUEUED", "expected": "QUEUED"}
    assert [entry[9] for entry in sorted(world.call(Fn.REQUESTS, 9, "all", "", 0, "")[i : i + 16] for i in (3, 19))] == [
        "0",
        "1",
    ]
    assert world.told("d", 2) == [], "nothing of the old incarnation reaches the new one"
    assert world.assign("held", "p", "d", epoch=1, d_inc=2) == ["OK", "2"]


def test_work_of_the_new_incarnation_survives_the_reap_of_the_old_one(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.decoding("old")
    world.instance("d")
    world.queued("new")
    assert world.assign("new", "p", "d", d_inc=2) == ["OK", "1"]
    assert world.reap()[0] == {"old": "QUEUED"}
    assert world.state("new") == "ASSIGNED"


def test_deregister_requeues_without_waiting_for_leases(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.decoding("r")
    assert world.call(Fn.DEREGISTER, "d", 2) == ["STALE"]
    assert world.call(Fn.DEREGISTER, "nobody", 1) == ["STALE"]
    assert world.call(Fn.DEREGISTER, "d", 1) == ["OK"]
    assert world.call(Fn.DEREGISTER, "d", 1) == ["OK"]
    assert world.view()["instances"]["d"]["state"] == "STOPPED"
    assert world.reap()[0] == {"r": "QUEUED"}
    assert world.call(Fn.PICK, "d", 1, 0, 64, LONG_MS) == ["STALE"]


def test_pick_holds_what_it_tells_until_acknowledged(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.assigned("a")
    world.assigned("b")
    first = world.pick("p", max_n=1)
    assert [(entry.kind, entry.id) for entry in first] == [("prefill", "a")]
    assert (world.state("a"), world.state("b")) == ("PREFILLING", "ASSIGNED")
    assert [entry.id for entry in world.pick("p")] == ["a", "b"], "told again until acknowledged"
    assert [entry.id for entry in world.pick("p", ack=first[0].seq)] == ["b"]
    last = world.pick("p")[-1].seq
    assert world.pick("p", ack=last) == []
    assert world.call(Fn.PICK, "nobody", 1, 0, 64, LONG_MS) == ["GONE"]
    with pytest.raises(redis.ResponseError, match="max_n"):
        world.pick("p", max_n=65)


def test_pick_carries_the_journal_of_a_continued_request(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.decoding("r")
    world.emit("r", 1, 1, 300, 301)
    world.lapse("r")
    world.reap()
    assert world.assign("r", "p", "d", epoch=1) == ["OK", "2"]
    assert world.view()["instances"]["p"]["p_tokens"] == 13, "prompt and journal are prefilled"
    for name, kind in (("p", "prefill"), ("d", "expect")):
        entry = world.pick(name)[-1]
        assert (entry.kind, entry.epoch, entry.attempts) == (kind, 2, "1")
        assert entry.journal == pack_tokens([7, 300, 301]).decode()


def test_both_sides_count_the_same_rows_however_late_one_reads(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.assigned("r")
    assert world.pick("p")[-1].journal == ""
    world.emit("r", 1, 0, 300)
    assert world.pick("d")[-1].journal == "", "the first token was journaled before D read its inbox"
    world.lapse("r")
    world.reap()
    world.assign("r", "p", "d", epoch=1)
    assert {world.pick(name)[-1].journal for name in "pd"} == {pack_tokens([300]).decode()}


@pytest.mark.parametrize("end", ["cancel", "finish", "reap"])
def test_a_role_without_blocks_is_given_back_too(world: World, end: str) -> None:
    world.instance("c")
    world.queued("r")
    assert world.assign("r", "c", "c", blocks=(0, 0))[0] == "OK"
    world.pick("c")
    if end == "cancel":
        world.cancel("r")
    elif end == "finish":
        world.emit("r", 1, 0, 5)
        assert world.finish("r", 1, 1)[0] == "OK"
    else:
        world.lapse("r")
        assert world.reap()[0] == {"r": "QUEUED"}
    record = world.view()["instances"]["c"]
    assert {record[name] for name in ("p_requests", "p_tokens", "p_blocks", "d_requests", "d_blocks")} == {0}


def test_pick_tells_entries_of_a_dead_epoch_as_revoke(world: World) -> None:
    for name in "pd":
        world.instance(name)
    for id in ("cancelled", "requeued", "reassigned"):
        world.assigned(id)
    world.cancel("cancelled")
    for id in ("requeued", "reassigned"):
        world.lapse(id)
    world.reap()
    assert world.assign("reassigned", "p", "d", epoch=1) == ["OK", "2"]
    told = world.told("p")
    assert {entry for entry in told if entry[0] != "revoke"} == {("prefill", "reassigned", 2)}
    assert {entry for entry in told if entry[0] == "revoke"} == {
        ("revoke", "cancelled", 1), ("revoke", "requeued", 1), ("revoke", "reassigned", 1),
    }  # fmt: skip
    assert told.index(("revoke", "reassigned", 1)) < told.index(("prefill", "reassigned", 2))
    assert {(kind, id) for kind, id, _ in world.told("d")} == {(kind.replace("prefill", "expect"), id) for kind, id, _ in told}
    world.assigned("failed")
    world.fail("failed", 1, "d", retryable=False)
    assert {entry for entry in world.told("p") if entry[1] == "failed"} == {("revoke", "failed", 1)}
    revoke = world.pick("p")[0]
    assert (revoke.spec, revoke.journal, revoke.peer_inst, revoke.ingress_id) == ("", "", "", "")


def test_pick_says_nothing_of_a_hand_off_that_both_sides_know(world: World) -> None:
    world.instance("c")
    world.queued("r")
    world.assign("r", "c", "c")
    assert world.told("c") == [("prefill", "r", 1)]
    world.handoff("r", 1, "c")
    assert world.told("c") == [], "a revoke would end the request that it decodes"
    assert world.state("r") == "DECODING"


def test_pick_bounds_the_bytes_of_a_reply(world: World) -> None:
    world.instance("c")
    for id in ("a", "b", "c"):
        world.queued(id, spec=b"s" * (5 * 1024 * 1024))
        world.assign(id, "c", "c")
    seen, ack = [], 0
    while entries := world.pick("c", ack=ack):
        seen.append([entry.id for entry in entries])
        ack = entries[-1].seq
    assert seen == [["a"], ["b"], ["c"]]
    for id in ("a", "b", "c"):
        world.redis.hset(f"{world.base}:r:{id}", "spec", "small")


def test_pick_keeps_the_lease_in_its_holders_hands(world: World) -> None:
    world.instance("c")
    world.queued("r")
    world.assign("r", "c", "c", lease_ms=0)
    world.pick("c")
    assert world.reap()[0] == {}, "a pick in time is as good as a renewal"
    world.pick("c", lease_ms=0)
    assert world.reap()[0] == {"r": "QUEUED"}


def test_renew_keeps_leases_and_names_what_is_lost(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.decoding("decoding")
    world.prefilling("prefilling")
    held = [("decoding", 1, "h"), ("prefilling", 1, "h"), ("nobody", 1, "h"), ("prefilling", 2, "h")]
    for id in ("decoding", "prefilling"):
        world.lapse(id)
    assert world.renew("p", 1, *held)[2:] == ["0", 3, "decoding", "nobody", "prefilling"]
    assert world.reap()[0] == {"decoding": "QUEUED"}
    world.prefilling("again")
    assert world.renew("d", 1, ("again", 1, "h"), ("again", 1, "e"))[3:] == [1, "again"]
    assert world.renew("p", 1, ("again", 1, "h"), ("again", 1, "e"))[3:] == [0]


def test_renew_e_keeps_no_lease_but_lasts_through_the_hand_off(world: World) -> None:
    for name in ("p", "d", "x"):
        world.instance(name)
    world.decoding("r")
    for name, lost in (("p", [0]), ("d", [0]), ("x", [1, "r"])):
        assert world.renew(name, 1, ("r", 1, "e"))[3:] == lost
    assert world.renew("p", 1, ("r", 1, "h"))[3:] == [1, "r"], "P holds nothing after the hand-off"
    world.lapse("r")
    world.renew("d", 1, ("r", 1, "e"))
    assert world.reap()[0] == {"r": "QUEUED"}
    assert world.renew("d", 1, ("r", 1, "e"))[3:] == [1, "r"]
    world.decoding("done")
    world.finish("done", 1, 1)
    for name in "pd":
        assert world.renew(name, 1, ("done", 1, "e"))[3:] == [1, "done"]


def test_renew_guards_the_life_of_an_instance(world: World) -> None:
    assert world.renew("nobody") == ["GONE"]
    world.call(Fn.REGISTER, "w", "decode", "a", "card")
    for state in ("STARTING", "READY", "READY", "DRAINING", "READY", "DRAINING", "DRAINING"):
        assert world.renew("w", 1, state=state)[0] == "OK", state
    assert world.renew("w", 1, state="STARTING") == ["STATE", "DRAINING"]
    assert world.renew("w", 2) == ["STALE"]
    world.call(Fn.DEREGISTER, "w", 1)
    assert world.renew("w", 1) == ["STALE"]
    with pytest.raises(redis.ResponseError, match="state has an unknown value"):
        world.renew("w", 1, state="LOST")


def test_handoff_moves_the_holder_once(world: World) -> None:
    for name in ("p", "d", "x"):
        world.instance(name)
    world.assigned("r")
    assert world.handoff("r", 1, "d") == ["STATE", "ASSIGNED"]
    world.pick("p")
    assert world.handoff("nobody", 1, "d") == ["GONE"]
    assert world.handoff("r", 0, "d") == ["STALE", "PREFILLING"]
    assert world.handoff("r", 2, "d") == ["STALE", "PREFILLING"]
    assert world.handoff("r", 1, "x") == ["STALE", "PREFILLING"]
    assert world.handoff("r", 1, "p") == ["STALE", "PREFILLING"]
    assert world.handoff("r", 1, "d", 2) == ["STALE", "PREFILLING"]
    world.lapse("r")
    for code in ("OK", "DUPLICATE", "DUPLICATE"):
        assert world.handoff("r", 1, "d") == [code, "DECODING"]
        assert world.view()["instances"]["p"]["p_requests"] == 0
    assert world.handoff("r", 1, "x") == ["STALE", "DECODING"]
    assert world.reap()[0] == {}, "the hand-off gave it a lease"
    world.lapse("r")
    world.reap()
    assert world.handoff("r", 1, "d") == ["STATE", "QUEUED"]
    world.cancel("r")
    assert world.handoff("r", 1, "d") == ["STALE", "CANCELLED"]


def test_fail_for_good_keeps_the_error(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.prefilling("r")
    assert world.fail("r", 1, "p", retryable=False) == ["OK", "FAILED"]
    assert world.look("r") == ["FAILED", "1", 0, "error", "oops"]
    assert ("revoke", "r", 1) in world.told("d")
    assert world.fail("r", 1, "p", retryable=False) == ["OK", "FAILED"], "told again, not done again"
    assert world.fail("nobody", 1, "p") == ["GONE"]


def test_fail_is_for_those_who_take_part(world: World) -> None:
    for name in ("p", "d", "x"):
        world.instance(name)
    world.decoding("r")
    assert world.fail("r", 2, "d") == ["STALE"]
    assert world.fail("r", 1, "x") == ["STALE"]
    assert world.fail("r", 1, "d", 2) == ["STALE"]
    assert world.fail("r", 1, "p") == ["STALE"], "P has left with the hand-off"
    assert world.state("r") == "DECODING"
    assert world.fail("r", 1, "d") == ["OK", "QUEUED"]


@pytest.mark.parametrize(("poison", "end", "reason"), [(True, "DEAD", "poison"), (False, "FAILED", "error")])
def test_retryable_failures_end_with_the_last_attempt(world: World, poison: bool, end: str, reason: str) -> None:
    for name in "pd":
        world.instance(name)
    world.queued("r")
    for attempt in (1, 2, 3):
        assert world.assign("r", "p", "d", epoch=attempt - 1)[0] == "OK"
        state = "QUEUED" if attempt < 3 else end
        for _ in range(2):
            assert world.fail("r", attempt, "d", poison=poison) == ["OK", state], "the repetition counts no attempt"
    assert world.look("r")[3:] == [reason, "oops"]


def test_a_request_that_failed_elsewhere_is_unaffected_by_the_old_holder(world: World) -> None:
    """A zombie of epoch 1 tries everything against epoch 2."""
    for name in ("p", "d", "p2", "d2"):
        world.instance(name)
    world.decoding("r")
    world.lapse("r")
    world.reap()
    assert world.assign("r", "p2", "d2", epoch=1) == ["OK", "2"]
    world.read("p2")
    before = world.redis.hgetall(f"{world.base}:r:r")
    assert world.emit("r", 1, 1, 99) == ["STALE", 1]
    assert world.finish("r", 1, 1)[0] == "STALE"
    assert world.handoff("r", 1, "d")[0] == "STALE"
    assert world.fail("r", 1, "d", retryable=False) == ["STALE"]
    assert world.renew("d", 1, ("r", 1, "h"))[3:] == [1, "r"]
    assert world.redis.hgetall(f"{world.base}:r:r") == before
    reply = world.call(Fn.STATS)
    assert int(reply[reply.index("stale_refused") + 1]) == 4


def test_a_full_store_refuses_submits_and_can_be_emptied(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.prefilling("r")
    world.assigned("s")
    world.assigned("t")
    world.queued("u")
    world.expire("t")
    world.redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            world.submit("refused")
        assert world.emit("r", 1, 0, 7) == ["OK", 1]
        assert world.handoff("r", 1, "d")[0] == "OK"
        assert world.renew("d", 1, ("r", 1, "h"))[3:] == [0]
        assert world.instance("late") == 1
        assert world.finish("r", 1, 1) == ["OK", "DONE"]
        assert world.fail("s", 1, "p", retryable=False) == ["OK", "FAILED"]
        assert world.reap()[0] == {"t": "EXPIRED"}
        assert world.assign("u", "p", "d") == ["OK", "1"]
        assert world.cancel("u") == ["OK", "CANCELLED"]
        assert world.call(Fn.LEAD, LEADER, LONG_MS, 1)[2] == 1
        assert world.call(Fn.VIEW, 10)[2] == 0
    finally:
        world.redis.config_set("maxmemory", "512mb")
    assert world.state("refused") == ""
