"""The log: stories, bounds, replay."""

from __future__ import annotations

import random

from orchestrator.control import events as on
from orchestrator.control.core import OrchestratorCore
from orchestrator.control.settings import CoreSettings
from orchestrator.control.story import Recorder, Viewed, replay, story
from orchestrator.domain.ids import InstanceId, RequestId
from orchestrator.domain.request import RequestState
from tests.support.core_world import CoreWorld, a_request, a_view, an_instance


def a_busy_world(seed: int) -> CoreWorld:
    """A run with arrivals, ends, a loss of the store and a loss of the leadership."""
    rng = random.Random(seed)
    world = CoreWorld(CoreSettings(lease_s=0.5, lost_s=0.5))
    for name in ("prefill-0", "prefill-1", "decode-0", "combined-0"):
        world.add(an_instance(name))
    for at in range(60):
        world.submit(
            a_request(f"r{at}", prompt=rng.randint(1, 900), max_tokens=rng.randint(1, 100), priority=rng.randint(-1, 1))
        )
        world.run(rng.random() * 0.2)
        for name, state in world.states().items():
            if state is RequestState.ASSIGNED and rng.random() < 0.5:
                world.hand_over(name)
            elif state is RequestState.DECODING and rng.random() < 0.5:
                world.finish(name)
        if at == 20:
            world.pending.clear()
            world.feed(on.StoreLost("the test took it away"))
            world.feed(on.StoreBack())
        if at == 40:
            world.leader = ("them", 50)
            world.run(2.0)
            world.leader = ("", 50)
    return world


def test_a_whole_log_replays_to_itself() -> None:
    world = a_busy_world(1)
    log = list(world.recorder)
    assert len(log) > 500
    assert replay(OrchestratorCore(world.settings, 0.0), log) == log


def test_equal_runs_make_equal_logs_and_others_do_not() -> None:
    assert list(a_busy_world(2).recorder) == list(a_busy_world(2).recorder)
    assert list(a_busy_world(2).recorder) != list(a_busy_world(3).recorder)


def test_the_story_of_a_request_and_of_an_instance() -> None:
    world = CoreWorld()
    world.add(an_instance("prefill-0"))
    world.add(an_instance("decode-0", decode_blocks=64))
    world.submit(a_request("r1"))
    world.submit(a_request("r2"))
    world.run(0.2)
    world.add(an_instance("decode-0", decode_blocks=0, beat_ms=world.now_ms))
    world.run(0.2)
    world.feed(on.Reaped(world.now_ms, (on.Ended(RequestId("r1"), RequestState.QUEUED),), (InstanceId("decode-0"),)))
    lines = [line.split("] ", 1)[1].split(" ", 1)[1] for line in story(world.recorder, "r1")]
    assert lines == [
        "LeadershipGained (leader epoch 1)",
        "r1 waits: no decode instance has the KV blocks or a free sequence",
        "r1 assignment 1: prefill-0/1 prefills, decode-0/1 decodes, reserves 7+8 blocks, from epoch 0",
        "r1 assignment 1: OK, epoch 1",
        "r1 overdue: now QUEUED",
    ]
    told = "\n".join(story(world.recorder, "decode-0"))
    assert "r1 assignment 1" in told
    assert "r2 assignment 1" in told
    assert "decode-0 set LOST" in told


def test_the_ring_is_bounded_and_keeps_no_views() -> None:
    recorder = Recorder(limit=10)
    view = a_view([an_instance("decode-0")], [a_request(f"r{at}") for at in range(100)])
    for number in range(50):
        recorder.record(on.ViewRead(number, view), [], float(number))
        recorder.record(on.Ticked(), [], float(number))
    assert len(recorder) == 10
    assert [entry.what for entry in recorder] == [Viewed(number, 100, ("decode-0",)) for number in range(40, 50)]
