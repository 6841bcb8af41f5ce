"""The orchestrator's decisions: `handle(event, now_s) -> effects`.

No I/O, no asyncio, no clock: the same events at the same times give the same effects, in production, in tests and in a
replay. Whoever drives it carries out every effect, reports each outcome as one event, and delivers Ticked when the last
WakeAt says so.

Theory of operation. The core leads or it does not; only a leader decides, and the store checks the leader's epoch again
on every decision. A leader alternates between looking and assigning: a hint, a timer or an answer makes it want a view;
a view makes one turn (control/turn.py), whose assignments go out as one Assign for each prefill instance. Requests stay
QUEUED until an instance has room, so the queue in the store is the only queue. What was assigned but is in no view yet is
charged in the inventory. When the store is away nothing is decided; when it is back nobody's lease is reaped before its
holder had one lease's time to renew it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.control import effects as do
from orchestrator.control import events as on
from orchestrator.control.balancer import Balancer
from orchestrator.control.effects import Effect
from orchestrator.control.events import Event
from orchestrator.control.inventory import Inventory
from orchestrator.control.settings import CoreSettings
from orchestrator.control.turn import Hold, Patience, TurnPlan, plan_turn
from orchestrator.domain.ids import InstanceId, LeaderEpoch, RequestId
from orchestrator.domain.view import ClusterView
from orchestrator.policy.load import Load
from orchestrator.policy.placement import WaitReason
from protos.contract.redis_names import Code

_NOT_LEADING = LeaderEpoch(0)

LeadAnswer = on.LeadershipGained | on.LeadershipKept | on.LeadershipDenied


class Standing(StrEnum):
    """Where the core stands."""

    STANDBY = "standby"  # another core leads, or nobody was asked yet
    LEADING = "leading"
    STORE_AWAY = "store away"


@dataclass(frozen=True, slots=True)
class CoreStatus:
    """For operators and tests."""

    standing: Standing
    epoch: LeaderEpoch
    under_way: int  # assignments that no view shows yet
    queued_total: int  # in the last view
    decisions: int  # assignments decided since the start


class OrchestratorCore:
    """Decides; see the module's theory of operation. Not thread-safe: one driver, one event at a time."""

    def __init__(self, settings: CoreSettings, now_s: float) -> None:
        self._settings = settings
        self._store_up = True
        self._contact_since_s: float | None = None  # the store has answered without a gap since
        self._backoff_s = settings.backoff_first_s
        self._clock_offset_s: float | None = None  # store clock minus ours, at the last answer
        self._epoch = _NOT_LEADING
        self._lease_until_s = now_s
        self._lead_at_s = now_s
        self._lead_number = 0
        self._lead_sent_s = now_s
        self._is_asking = False
        self._reap_at_s = now_s
        self._is_reaping = False
        self._view_number = 0
        self._is_reading = False
        self._wants_view = True
        self._view_at_s = now_s - settings.view_idle_s
        self._batch_number = 0
        self._inventory = Inventory()
        self._balancer = Balancer(settings.rebalance)
        self._view: ClusterView | None = None
        self._patience = Patience()
        self._explained: dict[RequestId, WaitReason] = {}
        self._wake_at_s: float | None = None
        self._queued_total = 0
        self._someone_waits = False
        self._decisions = 0

    @property
    def status(self) -> CoreStatus:
        """A snapshot."""
        standing = Standing.LEADING if self._epoch else Standing.STANDBY
        if not self._store_up:
            standing = Standing.STORE_AWAY
        return CoreStatus(standing, self._epoch, len(self._inventory), self._queued_total, self._decisions)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Takes one event in and says what to do, in order. `now_s` never goes back."""
        effects = self._take_in(event, now_s)
        if self._epoch and now_s >= self._lease_until_s:
            self._step_down(now_s)
        effects += self._due(now_s)
        wake_at_s = self._next_wake_s(now_s)
        if wake_at_s != self._wake_at_s or isinstance(event, on.Ticked):
            self._wake_at_s = wake_at_s
            effects.append(do.WakeAt(wake_at_s))
        return effects

    def _take_in(self, event: Event, now_s: float) -> list[Effect]:
        match event:
            case on.Ticked():
                pass
            case on.Hinted():
                self._wants_view = True
            case on.ViewRead():
                return self._on_view(event, now_s)
            case on.AssignReplied():
                self._on_assign_replied(event)
            case on.RunningRead():
                return self._on_running(event, now_s)
            case on.MigrateReplied():
                self._balancer.on_replied(event, self._view_number + 1)
                self._wants_view = True
            case on.Reaped():
                self._on_reaped(event, now_s)
            case on.LeadershipGained() | on.LeadershipKept() | on.LeadershipDenied():
                self._on_lead_answer(event, now_s)
            case on.LeadershipLost():
                if event.epoch == self._epoch:
                    self._step_down(now_s)
            case on.StoreLost():
                self._on_store_lost(now_s)
            case on.StoreBack():
                self._on_store_back(now_s)
            case _:
                raise TypeError(f"not an event: {event!r}")
        return []

    def _on_view(self, event: on.ViewRead, now_s: float) -> list[Effect]:
        if event.number != self._view_number or not self._is_reading:
            return []  # the answer to a question from before a loss of the store
        self._is_reading = False
        self._watch_store_clock(event.view.now_ms, now_s)
        self._inventory.observe(event.number)
        self._balancer.observe(event.number)
        self._view = event.view
        self._queued_total = event.view.queued_total
        if not self._epoch or now_s >= self._lease_until_s:
            return []
        plan = plan_turn(event.view, self._inventory, self._settings, self._patience, now_s, self._balancer.charged)
        self._patience = plan.patience
        self._someone_waits = bool(plan.waits)
        effects = [*self._explain(plan), *self._assign(plan)]
        return [*effects, *self._balancer.on_view(event.view, self._loads(event.view), plan.waits, now_s)]

    def _on_running(self, event: on.RunningRead, now_s: float) -> list[Effect]:
        if self._view is None or not self._epoch or now_s >= self._lease_until_s:
            return []
        moves = self._balancer.on_running(event, self._loads(self._view), self._epoch, now_s)
        room = self._balancer.made_room
        if moves and room is not None and self._patience.hold is None:
            # What leaves makes room for one request only: nobody else may take it.
            hold = Hold(room[0].request_id, room[0].priority, frozenset({room[1]}))
            self._patience = Patience(self._patience.passed_since_s, hold)
        return list(moves)

    def _loads(self, view: ClusterView) -> dict[InstanceId, Load]:
        return self._balancer.charged(self._inventory.loads(view, int(self._settings.suspect_s * 1000)))

    def _assign(self, plan: TurnPlan) -> list[Effect]:
        batches: dict[str, list[tuple[do.Assignment, int]]] = {}
        for assignment, tokens in plan.assignments:
            batches.setdefault(assignment.prefill, []).append((assignment, tokens))
        effects: list[Effect] = []
        size = self._settings.batch_requests
        for batch in batches.values():
            for first in range(0, len(batch), size):
                part = batch[first : first + size]
                self._batch_number += 1
                self._inventory.add(self._batch_number, part)
                items = tuple(assignment for assignment, _ in part)
                effects.append(do.Assign(self._batch_number, self._epoch, _ms(self._settings.lease_s), items))
                self._decisions += len(items)
        return effects

    def _on_assign_replied(self, event: on.AssignReplied) -> None:
        """What was refused is free again, and who was refused is still queued: both are worth another look."""
        self._inventory.settle(event.number, event.outcomes, self._view_number + 1)
        if self._someone_waits or any(outcome.code is not Code.OK for outcome in event.outcomes):
            self._wants_view = True

    def _explain(self, plan: TurnPlan) -> list[Effect]:
        news = [do.Explain(key, reason) for key, reason in plan.waits.items() if self._explained.get(key) is not reason]
        self._explained = dict(plan.waits)
        return list(news)

    def _on_reaped(self, event: on.Reaped, now_s: float) -> None:
        self._is_reaping = False
        self._watch_store_clock(event.now_ms, now_s)
        if event.requests or event.lost:
            self._wants_view = True
        if len(event.requests) >= self._settings.reap_limit:
            self._reap_at_s = now_s

    def _on_lead_answer(self, event: LeadAnswer, now_s: float) -> None:
        if event.number != self._lead_number:
            return  # the answer to a question from before a loss of the store: a newer one is under way
        self._is_asking = False
        self._watch_store_clock(event.now_ms, now_s)
        if isinstance(event, on.LeadershipDenied):
            self._step_down(now_s)
            return
        if event.epoch != self._epoch:
            self._forget_decisions()
            self._epoch = event.epoch
        # The lease runs from the moment of asking: the store granted it later than that.
        self._lease_until_s = self._lead_sent_s + self._settings.leader_lease_s
        self._lead_at_s = self._lead_sent_s + self._settings.leader_lease_s / 2

    def _on_store_lost(self, now_s: float) -> None:
        if self._store_up:
            self._store_up = False
            self._backoff_s = self._settings.backoff_first_s
        else:
            self._backoff_s = min(self._backoff_s * 2, self._settings.backoff_last_s)
        self._contact_since_s = None
        self._clock_offset_s = None
        self._is_reading = self._is_reaping = self._is_asking = False
        self._lead_at_s = now_s + self._backoff_s
        self._inventory.give_up_waiting(self._view_number + 1)
        self._balancer.give_up_waiting(self._view_number + 1)

    def _on_store_back(self, now_s: float) -> None:
        self._store_up = True
        self._contact_since_s = now_s
        self._wants_view = True

    def _watch_store_clock(self, now_ms: int, now_s: float) -> None:
        """A forward jump of the store's clock lapses every lease at once: it counts as a loss of contact."""
        offset_s = now_ms / 1000 - now_s
        jumped = self._clock_offset_s is not None and offset_s - self._clock_offset_s >= self._settings.lease_s
        self._clock_offset_s = offset_s
        if self._contact_since_s is None or jumped:
            self._contact_since_s = now_s

    def _step_down(self, now_s: float) -> None:
        self._epoch = _NOT_LEADING
        self._is_reaping = False
        if self._store_up:
            self._lead_at_s = now_s + self._settings.lead_retry_s
        self._forget_decisions()

    def _forget_decisions(self) -> None:
        self._inventory.clear()
        self._balancer = Balancer(self._settings.rebalance)
        self._patience = Patience()
        self._explained = {}
        self._wants_view = True

    def _due(self, now_s: float) -> list[Effect]:
        settings = self._settings
        effects: list[Effect] = []
        if not self._is_asking and now_s >= self._lead_at_s:
            self._is_asking = True
            self._lead_number += 1
            self._lead_sent_s = now_s
            effects.append(do.Lead(self._lead_number, self._epoch, _ms(settings.leader_lease_s)))
        if not self._epoch or not self._store_up:
            return effects
        if not self._is_reaping and now_s >= self._earliest_reap_s():
            self._is_reaping = True
            self._reap_at_s = now_s + settings.reap_every_s
            effects.append(
                do.Reap(self._epoch, settings.reap_limit, settings.max_attempts, _ms(settings.lost_s), _ms(settings.retain_s))
            )
        if not self._is_reading and now_s >= self._earliest_view_s():
            self._is_reading = True
            self._wants_view = False
            self._view_at_s = now_s
            self._view_number += 1
            effects.append(do.ReadView(self._view_number, settings.queue_limit))
        return effects

    def _earliest_reap_s(self) -> float:
        """Holders get one lease's time to renew after the store was away, or was new to us."""
        assert self._contact_since_s is not None, "a leader has heard from the store"
        return max(self._reap_at_s, self._contact_since_s + self._settings.lease_s)

    def _earliest_view_s(self) -> float:
        gap_s = self._settings.view_gap_s if self._wants_view else self._settings.view_idle_s
        return self._view_at_s + gap_s

    def _next_wake_s(self, now_s: float) -> float:
        wakes = [] if self._is_asking else [self._lead_at_s]
        if self._epoch:
            wakes.append(self._lease_until_s)
            if self._store_up and not self._is_reaping:
                wakes.append(self._earliest_reap_s())
            if self._store_up and not self._is_reading:
                wakes.append(self._earliest_view_s())
        return max(now_s, min(wakes, default=now_s + self._settings.leader_lease_s))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
