"""Moves of decoding requests: autan_migrate, handoff by the target, autan_stay, and every way in which a move is cut short."""

from __future__ import annotations

from typing import Any

import pytest

from protos.contract.redis_names import Fn
from tests.support.store_world import LEADER, World


@pytest.fixture
def decoding(world: World) -> World:
    """`r` decodes on d since epoch 1; t is there too."""
    for name in ("p", "d", "t"):
        world.instance(name)
    world.decoding()
    return world


def migrate(world: World, target: str = "t", epoch: int = 1, inc: int = 1, most: int = 3, new: int = 2) -> list[Any]:
    return world.call(Fn.MIGRATE, "", 0, most, 1, "r", epoch, target, inc, 5, new, b"signed", "balance", "a|b")[1:]


def stay(world: World, epoch: int = 2, instance: str = "d") -> list[Any]:
    return world.call(Fn.STAY, "r", epoch, instance, 1)


def blocks(world: World) -> dict[str, int]:
    return {name: i["d_blocks"] for name, i in world.view()["instances"].items()}


def test_a_move_runs_its_course(decoding: World) -> None:
    w = decoding
    assert migrate(w) == ["OK", "2"]
    assert migrate(w) == ["DUPLICATE", "2"]
    assert blocks(w) == {"p": 0, "d": 3, "t": 5}
    (entry,) = [e for e in w.pick("d") if e.kind == "move"]
    assert (entry.epoch, entry.peer_inst, entry.peer_addr, len(entry.journal)) == (2, "t", "addr:t", 4)
    assert entry.capability in ("signed", b"signed")
    (entry,) = w.pick("t")
    assert (entry.kind, entry.epoch, entry.peer_inst, entry.spec, len(entry.journal)) == ("arrive", 2, "d", "spec-r", 4)
    assert w.renew("d", 1, ("r", 1, "h"))[3] == 0 and w.renew("t", 1, ("r", 2, "e"))[3] == 0
    assert w.emit("r", 1, 1, 8) == ["OK", 2], "it decodes on meanwhile"
    assert w.handoff("r", 2, "d")[0] == "STALE"
    assert w.handoff("r", 2, "t") == ["OK", "DECODING"]
    assert w.handoff("r", 2, "t") == ["DUPLICATE", "DECODING"]
    assert blocks(w) == {"p": 0, "d": 0, "t": 5}
    assert w.emit("r", 1, 2, 9)[0] == "STALE" and w.emit("r", 2, 2, 9) == ["OK", 3]
    assert stay(w)[0] == "STALE", "too late"
    assert w.renew("d", 1, ("r", 1, "h"))[4:] == ["r"] and w.renew("t", 1, ("r", 2, "h"))[3] == 0
    assert w.told("t") == [] and ("move", "r", 2) not in w.told("d")
    assert w.finish("r", 2, 3) == ["OK", "DONE"]


def test_a_move_that_stays(decoding: World) -> None:
    w = decoding
    migrate(w)
    assert stay(w, instance="t")[0] == "STALE" and stay(w, epoch=1)[0] == "STALE"
    assert stay(w) == ["OK", "DECODING"]
    assert stay(w) == ["DUPLICATE", "DECODING"]
    assert w.handoff("r", 2, "t")[0] == "STALE", "nobody takes over by a closed move"
    assert w.told("t")[-1] == ("revoke", "r", 2)
    assert blocks(w) == {"p": 0, "d": 3, "t": 0}
    assert migrate(w) == ["STALE", "0"] and migrate(w, new=4) == ["STALE", "0"]
    assert migrate(w, new=3) == ["OK", "3"], "an epoch is given out once"
    w.lapse("r")
    assert w.reap()[0] == {"r": "QUEUED"}
    assert blocks(w) == {"p": 0, "d": 0, "t": 0}
    assert w.look("r")[1] == "3"
    assert w.assign("r", "p", "d", epoch=1)[0] == "STALE"
    assert w.assign("r", "p", "d", epoch=3) == ["OK", "4"], "the epoch for which the placement is signed"


def test_what_may_not_move(decoding: World) -> None:
    w = decoding
    assert migrate(w, epoch=2) == ["STALE", "0"] and migrate(w, "d") == ["STATE", "0"]
    assert migrate(w, "nobody") == ["STALE", "0"] and migrate(w, inc=2) == ["STALE", "0"]
    assert migrate(w, most=0) == ["FULL", "0"]
    w.call(Fn.DRAIN, "t", 1)
    assert migrate(w) == ["STALE", "0"]
    w.call(Fn.DRAIN, "t", 0)
    assert w.call(Fn.MIGRATE, LEADER, w.leader_epoch + 1, 3, 0) == ["NOT_LEADER"]
    assert w.call(Fn.MIGRATE, "", 0, 3, 1, "gone", 1, "t", 1, 5, 2, b"", "operator", "")[1:] == ["GONE", "0"]
    for epoch in (2, 3, 4):
        assert migrate(w, new=epoch) == ["OK", str(epoch)]
        assert stay(w, epoch)[0] == "OK"
    assert migrate(w, new=5) == ["FULL", "0"]


@pytest.mark.parametrize("how", ["cancel", "finish", "fail", "expire", "source", "target"])
def test_a_move_is_cut_short(decoding: World, how: str) -> None:
    w = decoding
    migrate(w)
    w.read("d")
    if how == "target":
        w.call(Fn.DEREGISTER, "t", 1)
        assert w.reap() == ({}, []), "the request decodes on"
        assert w.told("d") == [("stay", "r", 2)] and w.state("r") == "DECODING"
        assert stay(w) == ["DUPLICATE", "DECODING"]
        assert w.handoff("r", 2, "t")[0] == "STALE"
        return
    {
        "cancel": lambda: w.cancel("r"),
        "finish": lambda: w.finish("r", 1, 1),
        "fail": lambda: w.fail("r", 1, "d"),
        "expire": lambda: (w.expire("r"), w.reap()),
        "source": lambda: (w.call(Fn.DEREGISTER, "d", 1), w.reap()),
    }[how]()
    assert w.told("t")[-1] == ("revoke", "r", 2)
    assert w.handoff("r", 2, "t")[0] in ("STALE", "STATE") and w.handoff("r", 2, "t")[0] != "OK"
    assert w.renew("t", 1, ("r", 2, "e"))[4:] == ["r"]
    assert blocks(w) == {"p": 0, "d": 0, "t": 0}


def test_another_ingress_is_told_to_both_sides(decoding: World) -> None:
    w = decoding
    migrate(w)
    w.read("d")
    w.read("t")
    w.resume("r", take=True)
    assert w.told("d") == [("owner", "r", 1)] and w.told("t") == [("owner", "r", 2)]


def test_the_log_tells_what_became_of_moves(decoding: World) -> None:
    w = decoding
    migrate(w)
    stay(w)
    migrate(w, new=3)
    w.handoff("r", 3, "t")
    reply = w.call(Fn.MOVES, 10)
    lines = [reply[at + 1 : at + 8] for at in range(3, len(reply), 8)]
    assert lines == [
        ["moved", "r", "3", "d", "t", "balance", ""],
        ["begun", "r", "3", "d", "t", "balance", "a|b"],
        ["stayed", "r", "2", "d", "t", "balance", ""],
        ["begun", "r", "2", "d", "t", "balance", "a|b"],
    ]
    assert w.call(Fn.MOVES, 1)[2] == 1
