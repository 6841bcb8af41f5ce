"""autan_ingress, submit, cancel, resume, emit, finish, look, orphans: every reply and every guard."""

from __future__ import annotations

import pytest
import redis

from protos.contract.redis_names import Fn, pack_tokens
from tests.support.store_world import INGRESS, LONG_MS, World


def test_ingress_registers_renews_and_fences_its_former_self(world: World) -> None:
    assert world.call(Fn.INGRESS, "g1", "a", 1000, 0)[:2] == ["OK", "1"]
    assert world.call(Fn.INGRESS, "g1", "a", 1000, 1)[:2] == ["OK", "1"]
    assert world.call(Fn.INGRESS, "g1", "b", 1000, 0)[:2] == ["OK", "2"]
    assert world.call(Fn.INGRESS, "g1", "a", 1000, 1) == ["STALE"]
    assert world.call(Fn.INGRESS, "unknown", "a", 1000, 3) == ["STALE"]


def test_submit_accepts_once(world: World) -> None:
    reply = world.submit("r")
    assert reply[:4] == ["OK", "QUEUED", "0", 0]
    again = world.submit("r")
    assert again[:4] == ["DUPLICATE", "QUEUED", "0", 0]
    assert int(again[4]) >= int(reply[4])
    assert world.view()["queue"] == ["r"]


def test_a_new_request_starts_with_an_empty_journal(world: World) -> None:
    world.redis.set(f"{world.base}:t:r", b"\0\0\0\0")
    assert world.submit("r")[3] == 0
    assert world.look("r")[2] == 0


def test_submit_refuses_another_body_and_another_tenant(world: World) -> None:
    world.submit("r")
    assert world.submit("r", body="other") == ["CONFLICT"]
    assert world.submit("r", tenant="rival") == ["CONFLICT"]
    assert world.look("r")[0] == "QUEUED"


def test_submit_of_an_ended_request_tells_its_end(world: World) -> None:
    world.submit("r")
    world.cancel("r")
    assert world.submit("r")[:3] == ["DUPLICATE", "CANCELLED", "1"]


def test_submit_stops_at_the_queue_limit_but_knows_duplicates(world: World) -> None:
    world.submit("a", limit=2)
    world.submit("b", limit=2)
    assert world.submit("c", limit=2) == ["FULL", 2]
    assert world.state("c") == ""
    assert world.submit("a", limit=2)[0] == "DUPLICATE"


def test_queue_order_is_class_then_submission(world: World) -> None:
    for id, prio in (("z", 0), ("batch", -1), ("a", 0), ("high", 1), ("m", 0)):
        world.submit(id, prio=prio)
    assert world.view()["queue"] == ["high", "z", "a", "m", "batch"]


@pytest.mark.parametrize("id", ["", "a:b", "{x}", "a b", "é", "x" * 65, "a\0b", "a|1", "a\n"])
def test_ids_outside_the_charset_are_refused(world: World, id: str) -> None:
    with pytest.raises(redis.ResponseError, match="autan_submit: id is not of"):
        world.submit(id)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prio": 2}, "prio"),
        ({"timeout_ms": -1}, "timeout_ms"),
        ({"prompt": "1e3"}, "prompt_tokens"),
        ({"max": "0x10"}, "max_tokens"),
        ({"max": ""}, "max_tokens"),
        ({"max": "nan"}, "max_tokens"),
        ({"limit": "99999999999999999999"}, "queue_limit"),
    ],
)
def test_numbers_are_checked_before_anything_is_written(world: World, change: dict[str, object], complaint: str) -> None:
    with pytest.raises(redis.ResponseError, match=complaint):
        world.submit("r", **change)
    assert world.state("r") == ""


def test_missing_and_spare_arguments_are_refused(world: World) -> None:
    with pytest.raises(redis.ResponseError, match="is missing"):
        world.call(Fn.CANCEL, "r")
    with pytest.raises(redis.ResponseError, match="takes 4 arguments"):
        world.call(Fn.CANCEL, "r", "", "why", 1, "spare")


def test_cancel_ends_every_live_state_fences_and_revokes(world: World) -> None:
    for name in "pd":
        world.instance(name)
    for reach in (world.queued, world.assigned, world.prefilling, world.decoding):
        id = reach.__name__
        reach(id)
        old = int(world.look(id)[1])
        assert world.cancel(id) == ["OK", "CANCELLED"]
        assert world.look(id)[:2] == ["CANCELLED", str(old + 1)]
        assert world.look(id)[3] == "operator"
        expected = [("revoke", id, old)] if old else []
        for name in "pd":
            assert [told for told in world.told(name) if told[:2] == ("revoke", id)][-1:] == expected
        assert world.cancel(id) == ["DUPLICATE", "CANCELLED"]


def test_an_ingress_that_stops_waiting_at_the_deadline_expires_the_request(world: World) -> None:
    """Whoever asks later is told the same as the client that waited."""
    for name in "pd":
        world.instance(name)
    world.decoding("r")
    assert world.call(Fn.CANCEL, "r", "", "deadline", LONG_MS) == ["OK", "EXPIRED"]
    assert world.look("r")[0] == "EXPIRED"
    assert [told[:2] for told in world.told("d")][-1] == ("revoke", "r")
    assert world.cancel("r") == ["DUPLICATE", "EXPIRED"]


def test_cancel_of_a_foreign_or_unknown_request_is_gone(world: World) -> None:
    world.submit("r")
    assert world.cancel("r", tenant="rival") == ["GONE"]
    assert world.cancel("nobody") == ["GONE"]
    assert world.cancel("r", tenant="acme")[0] == "OK"


def test_cancel_hints_the_owning_ingress(world: World) -> None:
    world.submit("r")
    listener = world.redis.pubsub()
    listener.subscribe(f"{world.base}:hint:g:{INGRESS}")
    assert listener.get_message(timeout=5)["type"] == "subscribe"
    world.cancel("r")
    assert listener.get_message(timeout=5)["data"] == b"r"
    listener.close()


def test_emit_appends_in_order_and_deduplicates(world: World) -> None:
    world.instance("p")
    world.instance("d")
    world.prefilling()
    assert world.emit("r", 1, 0, 5, 6) == ["OK", 2]
    assert world.emit("r", 1, 0, 5, 6) == ["DUPLICATE", 2]
    assert world.emit("r", 1, 1, 6, 7, 8) == ["OK", 4]
    assert world.emit("r", 1, 4) == ["DUPLICATE", 4]
    assert world.emit("r", 1, 5, 9) == ["GAP", 4]
    assert world.emit("r", 1, 1, 6, 99) == ["DIVERGED", 4]
    assert world.emit("r", 1, 3, 99, 1) == ["DIVERGED", 4]
    assert world.resume("r")[4] == pack_tokens([5, 6, 7, 8]).decode()


def test_emit_journals_tokens_of_any_bytes(world: World) -> None:
    world.instance("p")
    world.instance("d")
    world.prefilling()
    tokens = [0, 10, 0xFFFFFFFF, 0x0D0A0D0A, 1 << 31]
    assert world.emit("r", 1, 0, *tokens) == ["OK", 5]
    assert world.emit("r", 1, 0, *tokens) == ["DUPLICATE", 5]
    assert world.resume("r", start=2)[4] == pack_tokens(tokens[2:])


def test_emit_refuses_stale_epochs_owners_and_states(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.queued("queued")
    world.prefilling("held")
    world.assigned("assigned")
    assert world.emit("queued", 0, 0, 1) == ["STATE", 0]
    assert world.emit("assigned", 1, 0, 1) == ["STATE", 0]
    assert world.emit("held", 0, 0, 1) == ["STALE", 0]
    assert world.emit("held", 2, 0, 1) == ["STALE", 0]
    assert world.emit("held", 1, 0, 1, ingress="g9") == ["STALE", 0]
    assert world.emit("held", 1, 0, 1, at=world.ingress_epoch + 1) == ["STALE", 0]
    assert world.emit("nobody", 1, 0, 1) == ["GONE", 0]
    world.lapse("held")
    world.reap()
    assert world.emit("held", 1, 0, 1) == ["STATE", 0]
    world.cancel("held")
    assert world.emit("held", 1, 0, 1) == ["STALE", 0]


def test_emit_takes_a_batch_item_by_item(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.prefilling("a")
    world.prefilling("b")
    one = pack_tokens([1])
    reply = world.call(
        Fn.EMIT, INGRESS, world.ingress_epoch, 5, "a", 1, 0, one, "nobody", 1, 0, one, "b", 9, 0, one, "b", 1, 0, one,
        "a", 1, 1, one,
    )  # fmt: skip
    assert reply == ["OK", "OK", 1, "GONE", 0, "STALE", 0, "OK", 1, "OK", 2]


def test_emit_refuses_a_damaged_batch_whole(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.prefilling("a")
    one = pack_tokens([1])
    with pytest.raises(redis.ResponseError, match="whole number of uint32"):
        world.call(Fn.EMIT, INGRESS, world.ingress_epoch, 2, "a", 1, 0, one, "a", 1, 1, b"abc")
    with pytest.raises(redis.ResponseError, match="k is no integer from 0 to 256"):
        world.call(Fn.EMIT, INGRESS, world.ingress_epoch, 257)
    assert world.look("a")[2] == 0


def test_finish_from_prefilling_and_decoding(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.prefilling("first")
    world.emit("first", 1, 0, 1)
    assert world.finish("first", 1, 1, "length") == ["OK", "DONE"]
    assert ("revoke", "first", 1) in world.read("p") and ("revoke", "first", 1) in world.read("d")
    world.prefilling("empty")
    assert world.finish("empty", 1, 0) == ["OK", "DONE"]
    for name in "pd":
        world.read(name)
    world.decoding("second")
    assert world.finish("second", 1, 1) == ["OK", "DONE"]
    assert world.told("p") == [] and world.told("d") == [("revoke", "second", 1)]
    assert world.finish("second", 1, 1) == ["DUPLICATE", "DONE"]
    assert world.look("first")[:4] == ["DONE", "1", 1, "length"]
    assert 0 < world.redis.pttl(f"{world.base}:r:first") <= LONG_MS
    assert 0 < world.redis.pttl(f"{world.base}:t:first") <= LONG_MS


def test_finish_needs_the_owner_the_epoch_and_the_exact_length(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.decoding("r")
    assert world.finish("r", 1, 2) == ["GAP", "DECODING", 1]
    assert world.finish("r", 1, 0) == ["GAP", "DECODING", 1]
    assert world.finish("r", 2, 1) == ["STALE", "DECODING"]
    assert world.finish("r", 1, 1, ingress="g9") == ["STALE", "DECODING"]
    assert world.finish("nobody", 1, 1) == ["GONE"]
    world.expire("r")
    world.reap()
    assert world.finish("r", 1, 1) == ["STATE", "EXPIRED"]


def test_finish_needs_work_done_but_not_a_place(world: World) -> None:
    """After its last token was journaled a request finishes even if its worker died before the finish."""
    for name in "pd":
        world.instance(name)
    world.queued("fresh")
    assert world.finish("fresh", 0, 0) == ["STATE", "QUEUED"]
    world.decoding("r")
    world.lapse("r")
    assert world.reap()[0] == {"r": "QUEUED"}
    assert world.emit("r", 1, 1, 8) == ["STATE", 1]
    assert world.finish("r", 1, 1) == ["OK", "DONE"]
    assert world.view()["queue"] == ["fresh"]


def test_emit_after_finish_is_refused(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.decoding("r")
    world.finish("r", 1, 1)
    assert world.emit("r", 1, 1, 9) == ["STATE", 1]
    assert world.emit("r", 1, 0, 7) == ["STATE", 1]


def test_resume_reads_tokens_from_an_index(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.prefilling("r")
    world.emit("r", 1, 0, 65, 66, 67)
    assert world.resume("r", start=1) == ["OK", "PREFILLING", "1", 3, pack_tokens([66, 67]).decode(), "", "", "spec-r"]
    assert world.resume("r", start=3)[4] == ""
    assert world.resume("r", start=4) == ["GAP", 3]
    assert world.resume("nobody") == ["GONE"]
    assert world.call(Fn.RESUME, "r", "rival", INGRESS, 1, "a", 0, 0) == ["GONE"]


def test_taking_a_request_moves_the_ownership_and_tells_the_workers(world: World) -> None:
    for name in "pd":
        world.instance(name)
    world.decoding("r")
    epoch = int(world.call(Fn.INGRESS, "g1", "addr:g1", LONG_MS, 0)[1])
    assert world.resume("r", ingress="g1", at=epoch)[1] == "DECODING"
    assert world.emit("r", 1, 1, 8) == ["OK", 2], "looking takes nothing"
    assert world.resume("r", take=True, ingress="g1", at=epoch)[0] == "OK"
    assert world.emit("r", 1, 2, 9) == ["STALE", 2]
    assert world.finish("r", 1, 2) == ["STALE", "DECODING"]
    assert world.emit("r", 1, 2, 9, ingress="g1", at=epoch) == ["OK", 3]
    for name in "pd":
        (entry,) = [entry for entry in world.pick(name) if entry.kind == "owner"]
        assert (entry.id, entry.epoch, entry.ingress_id, entry.ingress_addr) == ("r", 1, "g1", "addr:g1")
        assert (entry.spec, entry.journal, entry.peer_inst) == ("", "", "")


def test_an_ended_registration_takes_nothing(world: World) -> None:
    world.queued("r")
    assert world.resume("r", take=True, ingress="ghost", at=1) == ["STALE"]
    assert world.resume("r", ingress="ghost", at=1)[0] == "OK", "looking is free"
    world.call(Fn.INGRESS, INGRESS, "addr", LONG_MS, 0)
    assert world.resume("r", take=True) == ["STALE"]


def test_taking_an_ended_request_only_reads_it(world: World) -> None:
    world.queued("r")
    world.cancel("r")
    epoch = int(world.call(Fn.INGRESS, "g1", "addr:g1", LONG_MS, 0)[1])
    assert world.resume("r", take=True, ingress="g1", at=epoch)[:2] == ["OK", "CANCELLED"]
    assert world.redis.hget(f"{world.base}:r:r", "ing") == INGRESS.encode()


def test_orphans_are_live_requests_without_a_registered_owner(world: World) -> None:
    world.queued("mine")
    world.queued("ended")
    world.cancel("ended")
    world.queued("ghost", ingress="never-registered", ingress_epoch=1)
    orphans = lambda limit=10: world.call(Fn.ORPHANS, INGRESS, limit)[1:]  # noqa: E731
    assert orphans() == ["ghost"]
    world.forget_ingress()
    assert sorted(orphans()) == ["ghost", "mine"]
    assert len(orphans(1)) == 1
    assert orphans(0) == []
    world.call(Fn.INGRESS, INGRESS, "addr", LONG_MS, world.ingress_epoch)
    assert orphans() == ["ghost"], "a late renewal brings the registration back"
    world.ingress_epoch = int(world.call(Fn.INGRESS, INGRESS, "addr", LONG_MS, 0)[1])
    assert sorted(orphans()) == ["ghost", "mine"], "a new process owns nothing yet"
    for id in orphans():
        assert world.resume(id, take=True)[0] == "OK"
    assert orphans() == []


def test_look_tells_each_request_and_blanks_for_unknown_ones(world: World) -> None:
    world.queued("a")
    reply = world.call(Fn.LOOK, 2, "a", "nobody")
    assert reply == ["OK", "QUEUED", "0", 0, "", "", "", "", "", "", ""]
