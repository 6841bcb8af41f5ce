"""What a worker takes on, and what it must not take on any more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from workers.engine_api.types import EngineRequest, SamplingParams
from workers.kv_transfer.lifecycle import IllegalMove
from workers.service.assignments import FIRST_STAGE, STAGE_MOVES, Assignment, Assignments, Part, Stage


def assignment(request_id: str = "r", epoch: int = 1, part: Part = Part.PREFILL, **changes: Any) -> Assignment:
    request = EngineRequest(request_id=request_id, epoch=epoch, prompt=(1,), sampling=SamplingParams(max_tokens=1))
    values: dict[str, Any] = {
        "request": request, "part": part, "peer_instance": "d", "peer_address": "a", "peer_incarnation": 1,
        "ingress_address": "g", "queued_s": 0.0, "attempts": 0, "started_s": 0.0, "progress_s": 0.0,
    }  # fmt: skip
    return Assignment(**(values | changes))


def test_an_ended_epoch_is_never_taken_again() -> None:
    assignments = Assignments()
    first = assignment(epoch=2)
    assignments.take(first)
    assignments.end(first)
    assert first.ended
    assert assignments.is_stale("r", 2) and assignments.is_stale("r", 1) and not assignments.is_stale("r", 3)
    with pytest.raises(AssertionError):
        assignments.take(assignment(epoch=2))
    with pytest.raises(IllegalMove):
        assignments.end(first)


def test_a_fence_never_goes_back() -> None:
    assignments = Assignments()
    assignments.fence("r", 5)
    assignments.fence("r", 3)
    assert assignments.is_stale("r", 5) and not assignments.is_stale("r", 6)


def test_what_is_expected_is_not_held() -> None:
    held = {part: assignment(part=part).holds for part in Part}
    assert held == {Part.PREFILL: True, Part.DECODE: False, Part.FULL: True}


def test_only_what_the_engine_should_compute_can_be_stuck() -> None:
    assignments = Assignments()
    for name, part, progress_s in (("a", Part.PREFILL, 0.0), ("b", Part.DECODE, 0.0), ("c", Part.FULL, 9.0)):
        assignments.take(assignment(name, part=part, progress_s=progress_s))
    assert [a.request_id for a in assignments.stuck(10.0, 5.0)] == ["a"]


@given(st.sampled_from(Part), st.lists(st.sampled_from(Stage), max_size=8))
def test_a_walk_through_the_stages_follows_the_table(part: Part, targets: list[Stage]) -> None:
    one = assignment(part=part)
    stage = FIRST_STAGE[part]
    for target in targets:
        if target in STAGE_MOVES[stage]:
            one.lifecycle.move(target)
            stage = target
        else:
            with pytest.raises(IllegalMove):
                one.lifecycle.move(target)
        assert one.stage is stage
        assert one.ended == (stage is Stage.ENDED)


class AssignmentsMachine(RuleBasedStateMachine):
    """Messages of any epoch in any order: at most one epoch of a request is here, and it is above every fence."""

    def __init__(self) -> None:
        super().__init__()
        self.assignments = Assignments()
        self.live: dict[str, int] = {}
        self.floor: dict[str, int] = {}

    @rule(name=st.sampled_from("ab"), epoch=st.integers(1, 6))
    def arrive(self, name: str, epoch: int) -> None:
        here = self.live.get(name, 0)
        stale = epoch <= self.floor.get(name, 0) or epoch < here
        assert self.assignments.is_stale(name, epoch) == stale
        if stale or epoch == here:
            return
        older = self.assignments.get(name)
        if older is not None:
            self.assignments.end(older)
            self.floor[name] = max(self.floor.get(name, 0), older.epoch)
        self.assignments.take(assignment(name, epoch))
        self.live[name] = epoch

    @rule(name=st.sampled_from("ab"), epoch=st.integers(1, 6))
    def revoke(self, name: str, epoch: int) -> None:
        found = self.assignments.get(name)
        if found is not None and found.epoch <= epoch:
            self.assignments.end(found)
            del self.live[name]
        self.assignments.fence(name, epoch)
        self.floor[name] = max(self.floor.get(name, 0), epoch)

    @invariant()
    def agrees(self) -> None:
        assert {a.request_id: a.epoch for a in self.assignments.all()} == self.live
        assert all(epoch > self.floor.get(name, 0) for name, epoch in self.live.items())
        assert len(self.assignments) == len(self.live)


TestAssignmentsMachine = AssignmentsMachine.TestCase
