"""Which hints every change publishes. They may get lost, but a change without its hint costs a whole poll each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from protos.contract.redis_names import Fn
from tests.support.store_world import LONG_MS, World

Hints = set[tuple[str, str]]

CORE = ("core", "")
P = ("i:p", "")
D = ("i:d", "")
INGRESS = ("g:g0", "r")


@pytest.fixture
def published(world: World) -> Iterator[Callable[[Callable[[], object]], Hints]]:
    """Runs a call and returns the (channel, payload) pairs that it published."""
    for name in "pd":
        world.instance(name)
    listener = world.redis.pubsub()
    listener.psubscribe(f"{world.base}:hint:*", f"{world.base}:fence")
    seen: Hints = set()

    def until_fence() -> Hints:
        world.redis.publish(f"{world.base}:fence", "")
        seen.clear()
        while True:
            message = listener.get_message(timeout=5)
            assert message is not None, "the fence did not come"
            if message["type"] == "pmessage":
                channel = message["channel"].decode().removeprefix(world.base + ":")
                if channel == "fence":
                    return set(seen)
                seen.add((channel.removeprefix("hint:"), message["data"].decode()))

    def observe(call: Callable[[], object]) -> Hints:
        until_fence()
        call()
        return until_fence()

    yield observe
    listener.close()


def test_the_life_of_a_request(world: World, published: Callable[[Callable[[], object]], Hints]) -> None:
    assert published(lambda: world.submit("r")) == {CORE}
    assert published(lambda: world.submit("r")) == set()
    assert published(lambda: world.assign("r", "p", "d")) == {P, D}
    assert published(lambda: world.read("p")) == set()
    assert published(lambda: world.emit("r", 1, 0, 1)) == set()
    assert published(lambda: world.resume("r", take=True)) == {P, D}
    assert published(lambda: world.handoff("r", 1, "d")) == {CORE}
    assert published(lambda: world.handoff("r", 1, "d")) == set()
    assert published(lambda: world.finish("r", 1, 1)) == {CORE, D}, "the owner knows, P has left"


def test_ends_that_the_owner_did_not_bring_about(world: World, published: Callable[[Callable[[], object]], Hints]) -> None:
    world.prefilling("r")
    world.lapse("r")
    assert published(world.reap) == {CORE, P, D, INGRESS}, "queued again"
    world.assign("r", "p", "d", epoch=1)
    assert published(lambda: world.fail("r", 2, "p")) == {CORE, P, D, INGRESS}
    world.assign("r", "p", "d", epoch=2)
    assert published(lambda: world.cancel("r")) == {CORE, P, D, INGRESS}
    world.queued("s")
    world.expire("s")
    assert published(world.reap) == {CORE, ("g:g0", "s")}


def test_the_life_of_an_instance(world: World, published: Callable[[Callable[[], object]], Hints]) -> None:
    assert published(lambda: world.renew("p")) == set()
    assert published(lambda: world.renew("p", state="DRAINING")) == {CORE}
    assert published(lambda: world.call(Fn.DRAIN, "p", 1)) == {CORE, P}
    assert published(lambda: world.call(Fn.DEREGISTER, "p", 1)) == {CORE}
    assert published(lambda: world.call(Fn.REGISTER, "p", "prefill", "addr", "card")) == {CORE}
    world.silence("d")
    assert published(lambda: world.reap(lost_ms=LONG_MS)) == {CORE}


def test_totals_of_what_happened(world: World, published: object) -> None:
    world.prefilling("r")
    world.lapse("r")
    world.reap()
    world.assign("r", "p", "d", epoch=1)
    world.read("p")
    world.emit("r", 2, 0, 1)
    world.emit("r", 2, 0, 2)
    world.silence("d")
    world.reap(lost_ms=LONG_MS)
    reply = world.call(Fn.STATS)[1:]
    stats = dict(zip(reply[::2], reply[1::2], strict=True))
    expected = {"assigned": "2", "requeued": "2", "diverged_refused": "1", "lost": "1"}
    assert {name: stats[name] for name in expected} == expected
