"""When running requests move by themselves: watches views, asks for the running requests where there is a reason, decides.

A reason must hold for `settle_s` before it counts, and a balance that began goes on until half the gap is left; a drain
counts at once and needs no `enabled`. What was moved rests for `cool_down_s`. A move that was sent is charged at its target
until a view shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.control import effects as do
from orchestrator.control import events as on
from orchestrator.domain.ids import InstanceId, LeaderEpoch, RequestId
from orchestrator.domain.instance import DECODE_ROLES, InstanceState, InstanceView
from orchestrator.domain.view import ClusterView, QueuedRequest
from orchestrator.policy.load import Load
from orchestrator.policy.migration import RunningRequest
from orchestrator.policy.placement import WaitReason
from orchestrator.policy.rebalance import (
    Decision,
    Moving,
    Need,
    RebalanceRules,
    Why,
    balance_needs,
    plan_moves,
    room_needs,
)
from protos.contract.redis_names import Code

_READ_EVERY_S = 0.25
_PREEMPTED_FOR_S = 5.0
_FULL = frozenset({WaitReason.DECODE_FULL, WaitReason.HELD})

Loads = Mapping[InstanceId, Load]


@dataclass(frozen=True, slots=True)
class _Sent:
    """A move that no view shows yet. `shown_from`: number of the first view that does; None while unanswered."""

    move: do.Moved
    shown_from: int | None = None


class Balancer:
    """One for each core, told of every view that it leads by."""

    def __init__(self, rules: RebalanceRules) -> None:
        self._rules = rules
        self._number = 0
        self._is_reading = False
        self._read_at_s = 0.0
        self._needs: list[Need] = []
        self._since_s: dict[tuple[Why, InstanceId], float] = {}
        self._balancing = False
        self._preemptions: dict[InstanceId, tuple[int, int]] = {}
        self._preempted_s: dict[InstanceId, float] = {}
        self._moved_s: dict[RequestId, float] = {}
        self._sent: dict[RequestId, _Sent] = {}
        self._instances: dict[InstanceId, InstanceView] = {}
        self.made_room: tuple[QueuedRequest, InstanceId] | None = None  # by the last decision: for whom, and where

    def give_up_waiting(self, next_view: int) -> None:
        """The store was lost: no answer will come, view `next_view` tells what was done."""
        self._is_reading = False
        self._number += 1
        for key, sent in self._sent.items():
            if sent.shown_from is None:
                self._sent[key] = replace(sent, shown_from=next_view)

    def observe(self, number: int) -> None:
        """A view arrived: the moves that it shows are charged by it."""
        for key in [key for key, sent in self._sent.items() if sent.shown_from is not None and sent.shown_from <= number]:
            del self._sent[key]

    def charged(self, loads: Loads) -> dict[InstanceId, Load]:
        """The loads with what was sent and is in no view yet."""
        result = dict(loads)
        for sent in self._sent.values():
            target = result.get(sent.move.target)
            if target is not None and target.instance.incarnation == sent.move.target_incarnation:
                result[sent.move.target] = target.with_decode(sent.move.blocks)
        return result

    def on_view(
        self, view: ClusterView, loads: Loads, waits: Mapping[RequestId, WaitReason], now_s: float
    ) -> list[do.ReadRunning]:
        """Asks for the running requests of the instances that something may have to leave. `loads`: as `charged` gives them."""
        self._instances = {instance.instance_id: instance for instance in view.instances}
        self._watch_preemptions(now_s)
        needs = self._settled(self._find(view, loads, waits), now_s)
        if not needs or self._is_reading or now_s < self._read_at_s + _READ_EVERY_S:
            return []
        self._needs, self._is_reading, self._read_at_s = needs, True, now_s
        self._number += 1
        return [do.ReadRunning(self._number, tuple(sorted({need.source for need in needs})))]

    def on_running(self, event: on.RunningRead, loads: Loads, epoch: LeaderEpoch, now_s: float) -> list[do.Migrate]:
        """Decides. `loads`: as `charged` gives them."""
        if not self._is_reading or event.number != self._number:
            return []
        self._is_reading, self.made_room = False, None
        rules = self._rules
        self._moved_s = {key: at_s for key, at_s in self._moved_s.items() if now_s - at_s < rules.cool_down_s}
        running = [
            known
            for request in event.requests
            if request.request_id not in self._sent and (known := running_request(request, self._instances)) is not None
        ]
        decisions = plan_moves(self._needs, loads, running, self._moving(), rules, frozenset(self._moved_s))
        if not decisions:
            return []
        self.made_room = next(
            (
                (need.request, need.source)
                for need in self._needs
                for decision in decisions
                if decision.why is Why.ROOM and need.request is not None and need.source == decision.request.instance
            ),
            None,
        )
        self._number += 1
        items = tuple(self._moved(decision) for decision in decisions)
        for item in items:
            self._sent[item.request_id] = _Sent(item)
            self._moved_s[item.request_id] = now_s
        return [do.Migrate(self._number, epoch, rules.max_migrations, items)]

    def on_replied(self, event: on.MigrateReplied, next_view: int) -> None:
        """What was refused is charged no longer."""
        for outcome in event.outcomes:
            sent = self._sent.pop(outcome.request_id, None)
            if sent is not None and outcome.code in (Code.OK, Code.DUPLICATE):
                self._sent[outcome.request_id] = replace(sent, shown_from=next_view)

    def _find(self, view: ClusterView, loads: Loads, waits: Mapping[RequestId, WaitReason]) -> list[Need]:
        needs = [
            Need(Why.DRAIN, one.instance_id, "it drains")
            for one in view.instances
            if one.role in DECODE_ROLES
            and (one.state is InstanceState.DRAINING or (one.want_drain and one.state is InstanceState.READY))
            and one.decode_requests > one.moves_out
        ]
        if not self._rules.enabled:
            return needs
        needs += room_needs(loads.values(), _first_full(view, waits))
        for name in self._preempted_s:
            if name in loads:
                needs.append(Need(Why.PREEMPTING, name, f"{self._instances[name].preemptions} preemptions"))
        balance = balance_needs(loads.values(), self._rules.gap / 2 if self._balancing else self._rules.gap)
        self._balancing = bool(balance)
        return needs + balance

    def _settled(self, needs: list[Need], now_s: float) -> list[Need]:
        keys = [(need.why, need.source) for need in needs]
        self._since_s = {key: self._since_s.get(key, now_s) for key in keys}
        patience_s = self._rules.settle_s
        return [
            need
            for need, key in zip(needs, keys, strict=True)
            if need.why is Why.DRAIN or now_s - self._since_s[key] >= patience_s
        ]

    def _watch_preemptions(self, now_s: float) -> None:
        before, self._preemptions = self._preemptions, {}
        for name, one in self._instances.items():
            self._preemptions[name] = (one.incarnation, one.preemptions)
            known = before.get(name)
            if known is not None and known[0] == one.incarnation and one.preemptions > known[1]:
                self._preempted_s[name] = now_s
        self._preempted_s = {
            name: at_s
            for name, at_s in self._preempted_s.items()
            if name in self._instances and now_s - at_s < _PREEMPTED_FOR_S
        }

    def _moving(self) -> dict[InstanceId, Moving]:
        coming = {name: one.moves_in for name, one in self._instances.items()}
        going = {name: one.moves_out for name, one in self._instances.items()}
        for sent in self._sent.values():
            coming[sent.move.target] = coming.get(sent.move.target, 0) + 1
            going[sent.move.source] = going.get(sent.move.source, 0) + 1
        return {name: Moving(coming.get(name, 0), going.get(name, 0)) for name in coming.keys() | going.keys()}

    def _moved(self, decision: Decision) -> do.Moved:
        request, able = decision.request, decision.target.capabilities
        assert request.next_epoch is not None and request.incarnation is not None
        return do.Moved(
            request_id=request.request_id,
            expected_epoch=request.epoch,
            move_epoch=request.next_epoch,
            source=request.instance,
            source_incarnation=request.incarnation,
            target=decision.target.instance.instance_id,
            target_incarnation=decision.target.instance.incarnation,
            blocks=decision.blocks,
            # The last token is never fed back: it needs no row.
            most_blocks=-(-(request.most_tokens - 1) // able.block_tokens),
            block_bytes=able.block_bytes,
            deadline_ms=request.deadline_ms,
            why=decision.why.value,
            note=decision.note,
        )


def _first_full(view: ClusterView, waits: Mapping[RequestId, WaitReason]) -> QueuedRequest | None:
    """The first request of the queue that waits for blocks."""
    return next((request for request in view.queued if waits.get(request.request_id) in _FULL), None)


def running_request(request: RunningRequest, instances: Mapping[InstanceId, InstanceView]) -> RunningRequest | None:
    """The request with what is known of its instance; none when the instance is not known."""
    one = instances.get(request.instance)
    if one is None or one.capabilities is None:
        return None
    return replace(request, fingerprint=one.capabilities.fingerprint, incarnation=one.incarnation)
