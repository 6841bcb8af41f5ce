"""One turn of the scheduler: which queued requests go where now.

The view has the requests in queue order: class first, then age. A request that does not fit is passed by later ones that
do, but only for `patience_s`; after that the pair of instances that would take it soonest is held for it, and no request
of its class or a lower one is placed there before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.control.board import Board
from orchestrator.control.effects import Assignment
from orchestrator.control.inventory import Inventory, has_prefill_ready
from orchestrator.control.settings import CoreSettings
from orchestrator.domain.ids import InstanceId, RequestId
from orchestrator.domain.view import ClusterView, QueuedRequest
from orchestrator.policy.admission import has_decode_room, has_prefill_room
from orchestrator.policy.load import Load
from orchestrator.policy.placement import NOBODY, Placement, WaitReason, place, shortest_wait
from orchestrator.policy.prefix_source import choose_source

_MAX_REFUSALS = 8


@dataclass(frozen=True, slots=True)
class Hold:
    """Instances kept free for one request that was passed for too long."""

    request_id: RequestId
    priority: int
    instances: frozenset[InstanceId]


@dataclass(frozen=True, slots=True)
class Patience:
    """What one turn hands to the next: who was passed since when, and what is held for whom."""

    passed_since_s: Mapping[RequestId, float] = field(default_factory=dict)
    hold: Hold | None = None


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """The outcome of a turn: assignments with their prefill tokens in decision order, and why the others wait."""

    assignments: tuple[tuple[Assignment, int], ...]
    waits: Mapping[RequestId, WaitReason]
    patience: Patience


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A request of this size was refused in this turn; no request that needs as much of both can fit any more."""

    prefill_tokens: int
    whole_tokens: int
    reason: WaitReason


class _Turn:
    """The scratch pad of one turn."""

    def __init__(self, view: ClusterView, settings: CoreSettings, patience: Patience, loads: Mapping[InstanceId, Load]) -> None:
        self.view = view
        self.settings = settings
        self.loads = loads
        self.hold = patience.hold
        self.assignments: list[tuple[Assignment, int]] = []
        self.waits: dict[RequestId, WaitReason] = {}
        self._refusals: dict[tuple[str, bool], list[_Refusal]] = {}
        self._boards: dict[str, Board] = {}

    def board(self, model: str) -> Board:
        if model not in self._boards:
            loads = (load for load in self.loads.values() if load.capabilities.model == model)
            is_ready = has_prefill_ready(self.view.instances, model)
            self._boards[model] = Board(loads, is_ready, self.settings.rules)
        return self._boards[model]

    def try_place(self, request: QueuedRequest) -> bool:
        """Places the request or notes why it waits."""
        barred = self._barred(request)
        known = self._known_refusal(request, bool(barred))
        if known is not None:
            self.waits[request.request_id] = known
            return False
        decision = place(request, self.board(request.model).candidates, self.settings.rules, barred)
        if isinstance(decision, WaitReason):
            self.waits[request.request_id] = decision
            self._note_refusal(request, bool(barred), decision)
            return False
        self._accept(request, decision)
        return True

    def holds_for(self, request: QueuedRequest) -> None:
        """Chooses the instances to keep free for the request: of the best pair, those that have no room for it."""
        pair = shortest_wait(request, self.board(request.model).candidates)
        if pair is None:
            return
        source, target = pair
        kept = set()
        if not has_prefill_room(request, source, self.settings.rules.admission):
            kept.add(source.instance.instance_id)
        if not has_decode_room(request, target):
            kept.add(target.instance.instance_id)
        if kept:
            self.hold = Hold(request.request_id, request.priority, frozenset(kept))
            self._refusals.clear()

    def _accept(self, request: QueuedRequest, placement: Placement) -> None:
        board = self.board(request.model)
        source, target = board[placement.prefill].instance, board[placement.decode].instance
        assignment = Assignment(
            request.request_id,
            request.epoch,
            source.instance_id,
            source.incarnation,
            target.instance_id,
            target.incarnation,
            placement.prefill_blocks,
            placement.decode_blocks,
            target.capabilities.block_bytes if target.capabilities is not None else 0,
            request.deadline_ms,
            choose_source(request, board[placement.prefill], self.view.instances, self.settings.rules.prefix, self.view.now_ms),
        )
        board.charge(request, placement)
        self.assignments.append((assignment, request.prefill_tokens))

    def _barred(self, request: QueuedRequest) -> frozenset[InstanceId]:
        hold = self.hold
        if hold is None or hold.request_id == request.request_id or request.priority > hold.priority:
            return NOBODY
        return hold.instances

    def _known_refusal(self, request: QueuedRequest, barred: bool) -> WaitReason | None:
        whole = request.prompt_tokens + request.max_tokens
        for refusal in self._refusals.get((request.model, barred), ()):
            if request.prefill_tokens >= refusal.prefill_tokens and whole >= refusal.whole_tokens:
                return refusal.reason
        return None

    def _note_refusal(self, request: QueuedRequest, barred: bool, reason: WaitReason) -> None:
        refusals = self._refusals.setdefault((request.model, barred), [])
        if reason is not WaitReason.NEVER_FITS and len(refusals) < _MAX_REFUSALS:
            refusals.append(_Refusal(request.prefill_tokens, request.prompt_tokens + request.max_tokens, reason))


def plan_turn(
    view: ClusterView,
    inventory: Inventory,
    settings: CoreSettings,
    patience: Patience,
    now_s: float,
    charged: Callable[[Mapping[InstanceId, Load]], Mapping[InstanceId, Load]] = dict,
) -> TurnPlan:
    """Decides for every request of the view that is not under way. No argument is changed.

    `charged` adds to the loads what else is promised to the instances.
    """
    waiting = [request for request in view.queued if request.request_id not in inventory]
    present = {request.request_id for request in waiting}
    turn = _Turn(view, settings, patience, charged(inventory.loads(view, int(settings.suspect_s * 1000))))
    if turn.hold is not None and (turn.hold.request_id not in present or not turn.hold.instances <= turn.loads.keys()):
        turn.hold = None
    passed = {key: since for key, since in patience.passed_since_s.items() if key in present}
    blocked: list[RequestId] = []
    for request in waiting:
        since = passed.get(request.request_id)
        if turn.try_place(request):
            passed.pop(request.request_id, None)
            if turn.hold is not None and turn.hold.request_id == request.request_id:
                turn.hold = None
            for key in blocked:
                passed.setdefault(key, now_s)
            blocked.clear()
        elif turn.waits[request.request_id] is not WaitReason.NEVER_FITS:
            if since is None:
                blocked.append(request.request_id)
            elif turn.hold is None and now_s - since >= settings.patience_s:
                turn.holds_for(request)
    return TurnPlan(tuple(turn.assignments), turn.waits, Patience(passed, turn.hold))
