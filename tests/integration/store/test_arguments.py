"""Every function checks all of its arguments before its first write: whatever comes in, it is refused whole or done."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from protos.contract.redis_names import Code, Fn
from tests.support.store_invariants import Picture
from tests.support.store_world import INGRESS, LEADER, LONG_MS, World

Arguments = list[str | bytes | int]

VALID: dict[Fn, Arguments] = {
    Fn.INGRESS: ["g1", "addr", 1000, 0],
    Fn.SUBMIT: ["new", "hash", b"\xff", "acme", "m", 1, 1, 0, 1000, INGRESS, 1, "addr", 10],
    Fn.CANCEL: ["r", "", "why", 1000],
    Fn.RESUME: ["r", "", INGRESS, 1, "addr", 0, 1],
    Fn.EMIT: [INGRESS, 1, 1, "r", 1, 0, b"\0\0\0\0"],
    Fn.FINISH: [INGRESS, 1, "r", 1, "stop", 0, 1000],
    Fn.LOOK: [2, "r", "q"],
    Fn.ORPHANS: [INGRESS, 10],
    Fn.LEAD: [LEADER, LONG_MS, 1],
    Fn.VIEW: [10],
    Fn.PROMPTS: [2, "q", "r"],
    Fn.ASSIGN: [LEADER, 1, LONG_MS, 1, "q", 0, "p", 1, "d", 1, 1, 1, b"", "", 0, 0, 0, b""],
    Fn.REAP: [LEADER, 1, 10, 3, LONG_MS, 1000],
    Fn.REGISTER: ["w", "decode", "addr", "card"],
    Fn.DEREGISTER: ["d", 1],
    Fn.PICK: ["p", 1, 0, 10, LONG_MS],
    Fn.RENEW: ["p", 1, "READY", "stats", LONG_MS, 1, "r", 1, "h"],
    Fn.HANDOFF: ["r", 1, "d", 1, LONG_MS],
    Fn.FAIL: ["r", 1, "p", 1, 1, 0, 3, 1000, "oops"],
    Fn.DRAIN: ["p", 1],
    Fn.MIGRATE: [LEADER, 1, 3, 1, "m", 1, "t", 1, 5, 2, b"", "balance", "a note"],
    Fn.STAY: ["m", 2, "d", 1],
    Fn.STATS: [],
    Fn.REQUESTS: [10, "all", "", 0, ""],
    Fn.MOVES: [10],
}
GARBAGE: Arguments = ["", "-1", "1e3", "nan", "99999999999999999999", "{r}:x", b"\xff\0", "x" * 300]
READ_ONLY = {Fn.LOOK, Fn.ORPHANS, Fn.VIEW, Fn.PROMPTS, Fn.STATS, Fn.REQUESTS, Fn.MOVES}


@pytest.fixture
def busy(world: World) -> World:
    """One request at P, one that moves, one in the queue."""
    for name in "pdt":
        world.instance(name)
    world.prefilling("r")
    world.queued("q")
    world.decoding("m")
    assert world.call(Fn.MIGRATE, "", 0, 3, 1, "m", 1, "t", 1, 5, 2, b"", "operator", "")[1:] == ["OK", "2"]
    return world


def stored(world: World) -> dict[str, Any]:
    """Everything in the cluster's keys but the count of stale calls."""
    keys = Picture(world.raw).keys
    keys["counters"].pop("stale_refused", None)
    return keys


def test_every_function_has_an_example() -> None:
    assert set(VALID) == set(Fn)


@pytest.mark.parametrize("function", Fn)
def test_missing_and_spare_arguments_and_keys_change_nothing(busy: World, function: Fn) -> None:
    before = stored(busy)
    valid = VALID[function]
    for length in range(len(valid)):
        with pytest.raises(redis.ResponseError, match=f"{function}: .*is missing"):
            busy.call(function, *valid[:length])
    with pytest.raises(redis.ResponseError, match=f"{function}: takes {len(valid)} arguments"):
        busy.call(function, *valid, "spare")
    for keys in ([], [busy.base, busy.base]):
        with pytest.raises(redis.ResponseError, match=f"{function}: takes one key"):
            busy.redis.fcall(function, len(keys), *keys, *valid)
    assert stored(busy) == before
    assert busy.call(function, *valid)[0] == "OK" or function is Fn.FINISH


@pytest.mark.parametrize("function", Fn)
def test_garbage_is_refused_in_words_and_changes_nothing(busy: World, function: Fn) -> None:
    before = stored(busy)
    for at in range(len(VALID[function])):
        answered = False
        for garbage in GARBAGE:
            arguments = [*VALID[function]]
            arguments[at] = garbage
            try:
                reply = busy.call(function, *arguments)
            except redis.ResponseError as error:
                assert f"{function}: " in str(error) and "user_script" not in str(error), error
            else:
                assert reply[0] in set(Code)
                answered = True
        after = stored(busy)
        assert after == before or answered, at
        before = after


@pytest.mark.parametrize("function", sorted(READ_ONLY))
def test_readers_cannot_write(busy: World, function: Fn) -> None:
    before = stored(busy)
    assert busy.redis.execute_command("FCALL_RO", function, 1, busy.base, *VALID[function])[0] == b"OK"
    assert stored(busy) == before


@pytest.mark.parametrize("function", sorted(set(Fn) - READ_ONLY))
def test_writers_are_not_readers(busy: World, function: Fn) -> None:
    with pytest.raises(redis.ResponseError, match="with write flag"):
        busy.redis.execute_command("FCALL_RO", function, 1, busy.base, *VALID[function])


def test_a_binary_argument_is_bounded(world: World) -> None:
    with pytest.raises(redis.ResponseError, match="spec is longer than"):
        world.submit("r", spec=b"s" * (16 * 1024 * 1024 + 1))
    assert world.state("r") == ""
