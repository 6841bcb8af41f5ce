"""The core's own life: leadership, timers, the store that goes away, and its account of what no view shows yet."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from orchestrator.control import effects as do
from orchestrator.control import events as on
from orchestrator.control.core import OrchestratorCore, Standing
from orchestrator.control.settings import CoreSettings
from orchestrator.domain.ids import Epoch, LeaderEpoch, RequestId
from orchestrator.domain.instance import InstanceState
from orchestrator.domain.request import RequestState
from protos.contract.redis_names import Code
from tests.support.core_world import CoreWorld, a_request, a_view, an_instance, assigned

LEAD, VIEW, REAP, ASSIGN = do.Lead, do.ReadView, do.Reap, do.Assign


def a_world(**settings: object) -> CoreWorld:
    """A leading core with one instance of each role and nothing pending."""
    world = CoreWorld(CoreSettings(**settings))  # type: ignore[arg-type]
    world.add(an_instance("prefill-0"))
    world.add(an_instance("decode-0"))
    world.feed(on.Ticked())
    world.settle()
    assert world.core.status.standing is Standing.LEADING
    return world


def kinds(effects: list[do.Effect]) -> list[type]:
    return [type(effect) for effect in effects if not isinstance(effect, do.WakeAt | do.Explain)]


def test_a_new_core_asks_to_lead_and_does_nothing_else() -> None:
    world = CoreWorld()
    assert kinds(world.feed(on.Ticked())) == [LEAD]
    assert kinds(world.feed(on.Hinted())) == []


def test_a_leader_looks_at_once_and_again_after_each_hint() -> None:
    world = CoreWorld()
    (lead,) = [effect for effect in world.feed(on.Ticked()) if isinstance(effect, LEAD)]
    assert kinds(world.answer(lead)) == [VIEW]
    world.settle()
    world.clock.advance(0.01)
    assert kinds(world.feed(on.Hinted())) == [VIEW]
    assert kinds(world.feed(on.Hinted())) == []  # one view at a time; the hint is not forgotten
    world.answer(world.pending[0])
    world.clock.advance(0.01)
    assert kinds(world.feed(on.Ticked())) == [VIEW]


def test_hints_are_paced_and_without_hints_it_looks_now_and_then() -> None:
    world = a_world(view_gap_s=0.002, view_idle_s=0.1)
    world.feed(on.Hinted())
    assert world.wake_at_s == pytest.approx(0.002)
    views = [effect for effect in world.run(1.0) if isinstance(effect, VIEW)]
    assert 10 <= len(views) <= 12


def test_a_request_is_assigned_once_and_charged_until_a_view_shows_it() -> None:
    world = a_world()
    world.submit(a_request("r1"))
    world.clock.advance(0.01)
    world.feed(on.Hinted())
    view = world.pending[0]
    assert assigned(world.answer(view)) == {"r1": ("prefill-0", "decode-0")}
    assert world.core.status.under_way == 1
    world.clock.advance(0.2)
    (tick,) = [effect for effect in world.feed(on.Ticked()) if isinstance(effect, VIEW)]
    assert assigned(world.answer(tick)) == {}, "still QUEUED in this view, but under way"
    (assign,) = [effect for effect in world.pending if isinstance(effect, ASSIGN)]
    world.answer(assign)
    assert world.core.status.under_way == 1
    world.run(0.2)
    assert world.core.status.under_way == 0
    assert world.states() == {"r1": RequestState.ASSIGNED}


def view_under_way(world: CoreWorld) -> do.ReadView:
    """Lets the gap pass, hints, and returns the view that the core asks for."""
    world.clock.advance(0.01)
    world.feed(on.Hinted())
    (view,) = [effect for effect in world.pending if isinstance(effect, VIEW)]
    return view


def test_what_is_under_way_counts_against_the_room_of_later_turns() -> None:
    world = a_world()
    for at in range(4):
        world.submit(a_request(f"r{at}", prompt=240, max_tokens=16))  # they fill the pool of decode-0
    assert len(assigned(world.answer(view_under_way(world)))) == 4
    world.submit(a_request("r4"))
    assert assigned(world.answer(view_under_way(world))) == {}, "the pool looks empty in this view"


def test_a_view_that_was_asked_for_before_the_answer_does_not_settle_it() -> None:
    world = a_world()
    for at in range(4):
        world.submit(a_request(f"r{at}", prompt=240, max_tokens=16))
    world.answer(view_under_way(world))
    (assign,) = [effect for effect in world.pending if isinstance(effect, ASSIGN)]
    view = view_under_way(world)
    seen_before = world.view()
    world.answer(assign)
    world.pending.remove(view)
    assert assigned(world.feed(on.ViewRead(view.number, seen_before))) == {}
    assert world.core.status.under_way == 4
    world.answer(view_under_way(world))
    assert world.core.status.under_way == 0


def test_a_refused_assignment_is_free_again_at_once() -> None:
    world = a_world()
    world.submit(a_request("r1"))
    world.clock.advance(0.01)
    world.feed(on.Hinted())
    world.answer(world.pending[0])
    (assign,) = world.pending
    world.instances["decode-0"] = replace(world.instances["decode-0"], want_drain=True)
    effects = world.answer(assign)
    assert world.core.status.under_way == 0
    assert kinds(effects) == [] or kinds(effects) == [VIEW]
    world.instances["decode-0"] = replace(world.instances["decode-0"], want_drain=False)
    assert assigned(world.run(0.01)) == {"r1": ("prefill-0", "decode-0")}


def test_late_binding_leaves_in_the_queue_what_has_no_room() -> None:
    world = a_world()
    for at in range(10):
        world.submit(a_request(f"r{at}", prompt=240, max_tokens=16))  # 16 blocks each, decode-0 has 64
    done = assigned(world.run(0.5))
    assert sorted(done) == ["r0", "r1", "r2", "r3"]
    world.hand_over("r1")
    world.finish("r1")
    assert sorted(assigned(world.run(0.5))) == ["r4"]


def test_batches_are_of_one_prefill_instance_and_bounded() -> None:
    world = a_world(batch_requests=3)
    world.add(an_instance("prefill-1"))
    for at in range(8):
        world.submit(a_request(f"r{at}", prompt=16, max_tokens=16))
    batches = [effect for effect in world.run(0.2) if isinstance(effect, ASSIGN)]
    assert sorted(len(batch.items) for batch in batches) == [1, 1, 3, 3]
    assert all(len({item.prefill for item in batch.items}) == 1 for batch in batches)
    assert len({batch.number for batch in batches}) == 4


@pytest.mark.parametrize("state", [state for state in InstanceState if state is not InstanceState.READY])
def test_only_ready_instances_get_work(state: InstanceState) -> None:
    world = a_world()
    world.instances["decode-0"] = replace(world.instances["decode-0"], state=state)
    world.submit(a_request())
    assert assigned(world.run(0.3)) == {}


def test_draining_and_silent_instances_get_no_work() -> None:
    world = a_world(lost_s=100.0)
    world.add(an_instance("decode-1", want_drain=True))
    world.run(2.0, beating=False)
    world.submit(a_request())
    assert assigned(world.run(0.3, beating=False)) == {}
    world.beat()
    assert assigned(world.run(0.3)) == {"r1": ("prefill-0", "decode-0")}


def test_silence_of_the_prefill_side_is_no_reason_to_prefill_locally_but_its_loss_is() -> None:
    world = a_world(lease_s=1.0, lost_s=4.0, suspect_s=1.5)
    world.run(1.0)
    world.silent = {"prefill-0"}
    world.run(2.0)
    world.submit(a_request())
    assert assigned(world.run(1.5)) == {}
    assert assigned(world.run(2.0)) == {"r1": ("decode-0", "decode-0")}
    assert world.instances["prefill-0"].state is InstanceState.LOST


def test_the_lease_is_renewed_at_half_time() -> None:
    world = a_world(leader_lease_s=3.0)
    renewals = [effect for effect in world.run(10.0) if isinstance(effect, LEAD)]
    assert [renewal.epoch for renewal in renewals] == [1] * 6
    assert world.core.status.epoch == 1


def test_a_leader_that_cannot_renew_stops_by_itself() -> None:
    world = a_world(leader_lease_s=3.0)
    world.submit(a_request())
    world.clock.advance(3.0)
    effects = world.feed(on.Ticked())
    assert world.core.status.standing is Standing.STANDBY
    assert VIEW not in kinds(effects)
    assert REAP not in kinds(effects)


def test_a_refused_leader_stops_deciding_and_asks_again() -> None:
    world = a_world()
    world.submit(a_request())
    world.clock.advance(0.01)
    world.feed(on.Hinted())
    world.answer(world.pending[0])
    world.leader = ("them", 7)
    assert kinds(world.answer(world.pending[0])) == []
    assert world.core.status == replace(world.core.status, standing=Standing.STANDBY, under_way=0, epoch=LeaderEpoch(0))
    asked = world.run(1.0)
    assert set(kinds(asked)) == {LEAD}
    assert len(asked) >= 3
    world.leader = ("", 7)
    assert assigned(world.run(1.0)) == {"r1": ("prefill-0", "decode-0")}
    assert world.core.status.epoch == 8


def test_a_reap_that_was_refused_does_not_end_reaping() -> None:
    world = a_world(lease_s=1.0)
    world.run(2.0)
    while not any(isinstance(effect, REAP) for effect in world.pending):
        world.clock.advance(0.1)
        world.feed(on.Ticked())
    world.leader = ("them", 7)
    world.settle()
    assert world.core.status.standing is Standing.STANDBY
    world.leader = ("", 7)
    assert REAP in kinds(world.run(2.0))


def test_a_lease_counts_from_the_question_not_from_the_answer() -> None:
    world = CoreWorld(CoreSettings(leader_lease_s=3.0))
    world.feed(on.Ticked())
    (lead,) = world.pending
    world.clock.advance(2.0)
    world.answer(lead)
    assert world.core.status.standing is Standing.LEADING
    world.pending.clear()
    world.clock.advance(1.0)
    world.feed(on.Ticked())
    assert world.core.status.standing is Standing.STANDBY


def test_a_loss_told_about_an_old_epoch_changes_nothing() -> None:
    world = a_world()
    world.feed(on.LeadershipLost(LeaderEpoch(99)))
    assert world.core.status.standing is Standing.LEADING


def test_when_the_store_is_away_it_only_knocks_and_less_and_less_often() -> None:
    world = a_world()
    world.feed(on.StoreLost("gone"))
    knocks: list[float] = []
    while world.clock.now_s() < 10.0:
        world.clock.advance(max(0.0, world.wake_at_s - world.clock.now_s()))
        effects = kinds(world.feed(on.Ticked()))
        assert set(effects) <= {LEAD}
        if effects:
            knocks.append(world.clock.now_s())
            world.pending.clear()
            world.feed(on.StoreLost("gone"))
    gaps = [round(later - earlier, 6) for earlier, later in pairwise(knocks)]
    assert gaps == sorted(gaps)
    assert gaps[0] == pytest.approx(0.1)
    assert gaps[-1] == pytest.approx(1.0)


def test_after_an_absence_nothing_is_reaped_before_a_lease_is_over() -> None:
    world = a_world(lease_s=3.0)
    world.run(3.5)
    assert REAP in kinds(world.run(0.5))
    world.feed(on.StoreLost("gone"))
    world.pending.clear()
    world.clock.advance(8.0)
    world.feed(on.StoreBack())
    back_s = world.clock.now_s()
    assert REAP not in kinds(world.run(2.9))
    assert REAP in kinds(world.run(0.5))
    assert world.clock.now_s() - back_s < 4


def test_a_new_core_gives_the_same_grace_because_it_cannot_know_how_long_the_store_was_away() -> None:
    world = a_world(lease_s=3.0)
    assert REAP not in kinds(world.run(2.9))
    assert REAP in kinds(world.run(0.5))


def test_a_standby_that_was_in_touch_reaps_at_once_when_it_takes_over() -> None:
    world = CoreWorld(CoreSettings(lease_s=3.0))
    world.leader = ("them", 4)
    world.feed(on.Ticked())
    world.run(4.0)
    world.leader = ("", 4)
    assert REAP in kinds(world.run(0.3))


def test_a_jump_of_the_stores_clock_counts_as_an_absence() -> None:
    world = a_world(lease_s=3.0)
    world.run(4.0)
    world.feed(on.Hinted())
    view = next(effect for effect in world.pending if isinstance(effect, VIEW))
    world.pending.remove(view)
    world.feed(on.ViewRead(view.number, a_view([], [], now_ms=world.now_ms + 3_600_000)))
    world.pending.clear()
    jumped_s = world.clock.now_s()
    while world.clock.now_s() < jumped_s + 2.9:
        world.clock.advance(0.1)
        assert REAP not in kinds(world.feed(on.Ticked()))


def test_a_full_reap_is_followed_by_another_at_once() -> None:
    world = a_world(lease_s=1.0, reap_limit=2)
    world.clock.advance(1.1)
    world.feed(on.Ticked())
    reap = next(effect for effect in world.pending if isinstance(effect, REAP))
    world.pending.remove(reap)
    ended = tuple(on.Ended(RequestId(f"r{at}"), RequestState.QUEUED) for at in range(2))
    assert REAP in kinds(world.feed(on.Reaped(world.now_ms, ended, ())))


def test_answers_from_before_a_loss_are_ignored() -> None:
    world = a_world()
    world.submit(a_request())
    world.clock.advance(0.01)
    world.feed(on.Hinted())
    (view,) = world.pending
    world.feed(on.StoreLost("gone"))
    world.feed(on.StoreBack())
    assert assigned(world.feed(on.ViewRead(view.number, world.view()))) == {}


def test_an_assignment_whose_reply_was_lost_is_settled_by_the_next_view() -> None:
    world = a_world()
    world.submit(a_request("r1"))
    world.submit(a_request("r2"))
    world.clock.advance(0.01)
    world.feed(on.Hinted())
    world.answer(world.pending[0])
    (assign,) = world.pending
    world.execute(assign)
    world.pending.clear()
    world.requeue("r2")  # as if this half had not happened; its epoch did move
    world.feed(on.StoreLost("timeout"))
    assert world.core.status.under_way == 2
    world.feed(on.StoreBack())
    seen = world.run(1.0)
    assert assigned(seen) == {"r2": ("prefill-0", "decode-0")}
    assert world.core.status.under_way == 0


def test_why_a_request_waits_is_told_once_for_each_reason() -> None:
    world = a_world()
    world.instances["decode-0"] = replace(world.instances["decode-0"], decode_blocks=64)
    world.submit(a_request())
    world.run(1.0)
    world.instances["decode-0"] = replace(world.instances["decode-0"], state=InstanceState.DRAINING)
    world.run(1.0)
    told = [entry.what for entry in world.recorder if isinstance(entry.what, do.Explain)]
    assert [explain.reason.name for explain in told] == ["DECODE_FULL", "NO_DECODE_INSTANCE"]


def test_an_unknown_event_is_refused() -> None:
    with pytest.raises(TypeError, match="not an event"):
        OrchestratorCore(CoreSettings(), 0.0).handle("tick", 0.0)  # type: ignore[arg-type]


def test_every_code_but_ok_frees_the_dispatch() -> None:
    for code in (Code.STALE, Code.STATE, Code.GONE):
        world = a_world()
        world.submit(a_request())
        world.clock.advance(0.01)
        world.feed(on.Hinted())
        world.answer(world.pending[0])
        (assign,) = world.pending
        assert isinstance(assign, ASSIGN)
        world.feed(on.AssignReplied(assign.number, (on.AssignOutcome(RequestId("r1"), code, Epoch(0)),)))
        assert world.core.status.under_way == 0
