"""The core's account of its own dispatches that no view shows yet.

A view is a read of the past: an Assign that was sent after the view was taken is not in it. Every dispatch is therefore
charged here from the moment the core decides it until a view that was asked for after its answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from orchestrator.control.effects import Assignment
from orchestrator.control.events import AssignOutcome
from orchestrator.domain.ids import InstanceId, RequestId
from orchestrator.domain.instance import ALIVE_STATES, DECODE_ROLES, InstanceState, InstanceView, Role
from orchestrator.domain.view import ClusterView
from orchestrator.policy.contract import Member, set_apart
from orchestrator.policy.load import Load, load_of
from protos.contract.redis_names import Code


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One assignment under way. `shown_from`: number of the first view that shows its outcome; None while unanswered."""

    assignment: Assignment
    batch: int
    prefill_tokens: int
    shown_from: int | None = None


class Inventory:
    """Dispatches under way, by request. At most one per request."""

    def __init__(self) -> None:
        self._dispatches: dict[RequestId, Dispatch] = {}

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._dispatches

    def __len__(self) -> int:
        return len(self._dispatches)

    def add(self, batch: int, assignments: Iterable[tuple[Assignment, int]]) -> None:
        """Charges a batch of (assignment, prefill tokens) that is about to be sent."""
        for assignment, tokens in assignments:
            assert assignment.request_id not in self._dispatches, f"{assignment.request_id} is under way already"
            self._dispatches[assignment.request_id] = Dispatch(assignment, batch, tokens)

    def settle(self, batch: int, outcomes: Sequence[AssignOutcome], next_view: int) -> None:
        """An answer came. What was refused is charged no longer; what was done is, until view `next_view` shows it."""
        for outcome in outcomes:
            dispatch = self._dispatches.get(outcome.request_id)
            if dispatch is None or dispatch.batch != batch:
                continue
            if outcome.code is Code.OK:
                self._dispatches[outcome.request_id] = replace(dispatch, shown_from=next_view)
            else:
                del self._dispatches[outcome.request_id]

    def give_up_waiting(self, next_view: int) -> None:
        """No answer will come any more: view `next_view` tells what was done."""
        for request_id, dispatch in self._dispatches.items():
            if dispatch.shown_from is None:
                self._dispatches[request_id] = replace(dispatch, shown_from=next_view)

    def observe(self, number: int) -> None:
        """A view arrived: what it shows is charged no longer."""
        shown = [
            key
            for key, dispatch in self._dispatches.items()
            if dispatch.shown_from is not None and dispatch.shown_from <= number
        ]
        for key in shown:
            del self._dispatches[key]

    def clear(self) -> None:
        """Forgets everything: another core decides now."""
        self._dispatches.clear()

    def loads(self, view: ClusterView, suspect_ms: int) -> dict[InstanceId, Load]:
        """The instances that take work, were heard of lately and serve what the others do, with what is promised to them."""
        apart = _set_apart(view.instances)
        loads = {
            instance.instance_id: load_of(instance)
            for instance in view.instances
            if instance.takes_work and view.now_ms - instance.beat_ms <= suspect_ms and instance.instance_id not in apart
        }
        for dispatch in self._dispatches.values():
            _charge(loads, dispatch.assignment, dispatch.prefill_tokens)
        return loads


def _set_apart(instances: Iterable[InstanceView]) -> dict[str, str]:
    return set_apart(
        Member(
            instance_id=one.instance_id,
            model=one.capabilities.model,
            fingerprint=one.capabilities.fingerprint,
            decodes=one.role in DECODE_ROLES,
        )
        for one in instances
        if one.capabilities is not None and one.state in ALIVE_STATES
    )


def _charge(loads: dict[InstanceId, Load], assignment: Assignment, prefill_tokens: int) -> None:
    """Adds one dispatch to the loads of its two instances, as far as they are there in that incarnation."""
    source = loads.get(assignment.prefill)
    if source is not None and source.instance.incarnation == assignment.prefill_incarnation:
        loads[assignment.prefill] = source.with_prefill(prefill_tokens, assignment.prefill_blocks)
    target = loads.get(assignment.decode)
    if target is not None and target.instance.incarnation == assignment.decode_incarnation:
        loads[assignment.decode] = target.with_decode(assignment.decode_blocks)


def has_prefill_ready(instances: Iterable[InstanceView], model: str) -> bool:
    """True when a prefill instance of the model is READY, even one that is under suspicion or asked to drain."""
    return any(
        instance.role is Role.PREFILL
        and instance.state is InstanceState.READY
        and instance.capabilities is not None
        and instance.capabilities.model == model
        for instance in instances
    )
