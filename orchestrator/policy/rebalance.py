"""Which running requests move by themselves, where to and why. Pure: frozen values and a time in, moves out; ties by id.

Four reasons, in this order: an instance drains; a request waits for blocks that the instances have only together; an
instance preempts; free blocks are spread unevenly. The figures are those of Llumnix (Sun et al., OSDI 2024, 4.4 and the
balance rule of llumnix-ray 0.1): the virtual usage V of an instance is what its requests may fill, here what is reserved
for them; its freeness is `(M - V) / B` with M blocks and B running requests; load moves from the least to the most free
instance iff `0 <= source_after - target_after < source - target` and `target_after <= CEILING`, loads being V / M. After
such a move the reverse one is never allowed, so nothing goes to and fro.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.domain.ids import InstanceId, RequestId
from orchestrator.domain.instance import DECODE_ROLES
from orchestrator.domain.view import QueuedRequest
from orchestrator.policy.admission import could_decode, has_decode_room
from orchestrator.policy.load import Load, whole_blocks
from orchestrator.policy.migration import RunningRequest

CEILING = 0.9  # of a pool: what is moved for comfort fills no target further
_DRAIN_LEFT_TOKENS = 8
_MAX_ROOM_SOURCES = 4


class Why(StrEnum):
    """Why a request moves."""

    DRAIN = "drain"
    ROOM = "room"
    PREEMPTING = "preempting"
    BALANCE = "balance"


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceRules:
    """What the operator decides; see RebalanceConfig."""

    enabled: bool = True
    gap: float = 0.25
    settle_s: float = 1.0
    cool_down_s: float = 5.0
    max_moves_per_instance: int = 4
    min_left_tokens: int = 64
    max_migrations: int = 3


@dataclass(frozen=True, slots=True)
class Need:
    """A reason to move something away from `source`. `request`: of ROOM, who waits. `note`: the figures, for operators."""

    why: Why
    source: InstanceId
    note: str
    request: QueuedRequest | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """One request, its target, the blocks that are charged there, and why."""

    request: RunningRequest
    target: Load
    blocks: int
    why: Why
    note: str


@dataclass(frozen=True, slots=True)
class Moving:
    """Moves that are open at an instance, those included that no view shows yet."""

    coming: int = 0
    going: int = 0


def used_share(load: Load) -> float:
    """Virtual usage as a share of the pool."""
    return load.reserved_blocks / load.capabilities.total_blocks


def freeness(load: Load) -> float:
    """Free blocks for each running request; an idle instance counts as one that runs one."""
    return (load.capabilities.total_blocks - load.reserved_blocks) / max(1, load.decode_requests)


def _group(loads: Iterable[Load]) -> list[list[Load]]:
    """Decode instances that may exchange requests, by fingerprint."""
    groups: dict[str, list[Load]] = {}
    for load in sorted(loads, key=lambda one: one.instance.instance_id):
        if load.role in DECODE_ROLES:
            groups.setdefault(load.capabilities.fingerprint, []).append(load)
    return [group for _, group in sorted(groups.items()) if len(group) > 1]


def balance_needs(loads: Iterable[Load], gap: float) -> list[Need]:
    """The least free instance of each group whose free share is more than `gap` below that of the most free one."""
    needs = []
    for group in _group(loads):
        source = min(group, key=lambda one: (freeness(one), one.instance.instance_id))
        target = max(group, key=lambda one: (freeness(one), one.instance.instance_id))
        if used_share(source) - used_share(target) > gap and source.decode_requests > 1:
            there = f"{used_share(target):.0%} at {target.instance.instance_id}"
            note = f"{used_share(source):.0%} of its blocks are promised, {there}"
            needs.append(Need(Why.BALANCE, source.instance.instance_id, note))
    return needs


def room_needs(loads: Iterable[Load], waiting: QueuedRequest | None) -> list[Need]:
    """Where room could be made for a request that no instance has room for and all have together; the emptiest first."""
    if waiting is None:
        return []
    for group in _group(load for load in loads if load.capabilities.model == waiting.model):
        able = [load for load in group if could_decode(waiting, load)]
        free = sum(max(0, load.capabilities.total_blocks - load.reserved_blocks) for load in group)
        if not able or any(has_decode_room(waiting, load) for load in able):
            continue
        if free < min(whole_blocks(waiting, load.capabilities) for load in able):
            continue
        able.sort(key=lambda one: (used_share(one), one.instance.instance_id))
        blocks = whole_blocks(waiting, able[0].capabilities)
        note = f"{waiting.request_id} waits for {blocks} blocks, {free} are free on {len(group)} instances together"
        return [Need(Why.ROOM, load.instance.instance_id, note, waiting) for load in able[:_MAX_ROOM_SOURCES]]
    return []


def plan_moves(
    needs: Sequence[Need],
    loads: Mapping[InstanceId, Load],
    running: Iterable[RunningRequest],
    moving: Mapping[InstanceId, Moving],
    rules: RebalanceRules,
    resting: frozenset[RequestId] = frozenset(),
) -> list[Decision]:
    """Moves for the needs, in their order. `loads`: instances that take work, everything decided so far charged.

    No instance gets beyond `max_moves_per_instance` open moves in either direction; a source of anything but a drain has
    none open when it is planned for, because its load is not known before they end. A request that rests, is moving, was
    moved `max_migrations` times or ends soon stays. Room is made completely or not at all.
    """
    plan = _Plan(dict(loads), running, moving, rules, resting)
    roomy: set[RequestId] = set()
    for need in needs:
        if need.why is Why.DRAIN:
            plan.drain(need)
        elif need.why is Why.ROOM and need.request is not None:
            if need.request.request_id not in roomy and plan.make_room(need, need.request):
                roomy.add(need.request.request_id)
        elif need.why is Why.PREEMPTING:
            plan.relieve(need)
        else:
            plan.balance(need)
    return plan.decisions


class _Plan:
    """The scratch pad of one plan."""

    def __init__(
        self,
        loads: dict[InstanceId, Load],
        running: Iterable[RunningRequest],
        moving: Mapping[InstanceId, Moving],
        rules: RebalanceRules,
        resting: frozenset[RequestId],
    ) -> None:
        self.loads = loads
        self.decisions: list[Decision] = []
        self._rules = rules
        self._resting = resting
        self._coming = {name: one.coming for name, one in moving.items()}
        self._going = {name: one.going for name, one in moving.items()}
        self._running: dict[InstanceId, list[RunningRequest]] = {}
        for request in sorted(running, key=lambda one: (one.blocks, one.tokens, one.request_id)):
            if not request.is_moving and request.moves < rules.max_migrations:
                self._running.setdefault(request.instance, []).append(request)

    def drain(self, need: Need) -> None:
        """As much as fits elsewhere, the smallest first."""
        for request in list(self._running.get(need.source, ())):
            if self._going.get(need.source, 0) >= self._rules.max_moves_per_instance:
                return
            target = self._target(request, 1.0)
            if request.left_tokens > _DRAIN_LEFT_TOKENS and target is not None:
                self._decide(request, target, need)

    def make_room(self, need: Need, waiting: QueuedRequest) -> bool:
        """The fewest blocks whose leaving makes room, if all of them find a place."""
        load = self.loads.get(need.source)
        if load is None or self._going.get(need.source, 0):
            return False
        able = load.capabilities
        missing = whole_blocks(waiting, able) - (able.total_blocks - load.reserved_blocks)
        chosen = _fewest(self._movable(need.source), missing, load.decode_requests >= able.max_running)
        before = (dict(self.loads), dict(self._coming), dict(self._going), list(self.decisions))
        for request in chosen:
            target = self._target(request, 1.0)
            if target is None:
                self.loads, self._coming, self._going, self.decisions = before
                return False
            self._decide(request, target, need)
        return bool(chosen)

    def relieve(self, need: Need) -> None:
        """The smallest request of an instance that preempts."""
        if self._going.get(need.source, 0):
            return
        for request in self._movable(need.source):
            target = self._target(request, CEILING)
            if target is not None:
                self._decide(request, target, need)
                return

    def balance(self, need: Need) -> None:
        """The move after which the loads are closest, again and again while the rule allows one."""
        if self._going.get(need.source, 0) or self._coming.get(need.source, 0):
            return
        while self._going.get(need.source, 0) < self._rules.max_moves_per_instance:
            source = self.loads.get(need.source)
            if source is None:
                return
            best: tuple[float, str, RunningRequest, Load] | None = None
            for request in self._movable(need.source):
                target = self._target(request, CEILING)
                if target is None:
                    continue
                after = _apart(source, target, request.blocks)
                if 0 <= after < used_share(source) - used_share(target):
                    rank = (after, str(request.request_id), request, target)
                    best = rank if best is None or rank[:2] < best[:2] else best
            if best is None:
                return
            self._decide(best[2], best[3], need)

    def _movable(self, source: InstanceId) -> list[RunningRequest]:
        return [
            request
            for request in self._running.get(source, ())
            if request.left_tokens >= self._rules.min_left_tokens and request.request_id not in self._resting
        ]

    def _target(self, request: RunningRequest, ceiling: float) -> Load | None:
        """The most free instance that has room for the request."""
        source = request.fingerprint
        best: tuple[float, str] | None = None
        for name, load in self.loads.items():
            able = load.capabilities
            fits = (
                load.reserved_blocks + request.blocks <= ceiling * able.total_blocks and load.decode_requests < able.max_running
            )
            busy = self._coming.get(name, 0) >= self._rules.max_moves_per_instance or self._going.get(name, 0)
            if name == request.instance or load.role not in DECODE_ROLES or able.fingerprint != source or busy or not fits:
                continue
            rank = (-freeness(load), str(name))
            best = rank if best is None else min(best, rank)
        return None if best is None else self.loads[InstanceId(best[1])]

    def _decide(self, request: RunningRequest, target: Load, need: Need) -> None:
        name = target.instance.instance_id
        self.decisions.append(Decision(request, target, request.blocks, need.why, need.note))
        self._running[request.instance].remove(request)
        self.loads[name] = target.with_decode(request.blocks)
        source = self.loads.get(request.instance)
        if source is not None:
            self.loads[request.instance] = source.without_decode(request.blocks)
        self._coming[name] = self._coming.get(name, 0) + 1
        self._going[request.instance] = self._going.get(request.instance, 0) + 1


def _apart(source: Load, target: Load, blocks: int) -> float:
    """How much more loaded the source is after so many blocks went over."""
    return used_share(source.without_decode(blocks)) - used_share(target.with_decode(blocks))


def _fewest(requests: Sequence[RunningRequest], blocks: int, sequence: bool) -> list[RunningRequest]:
    """The smallest request that frees so many blocks, else the largest ones until they do; none when all do not.

    `requests` come smallest first; `sequence`: at least one has to go.
    """
    if blocks <= 0:
        return list(requests[:1]) if sequence else []
    single = next((request for request in requests if request.blocks >= blocks), None)
    if single is not None:
        return [single]
    chosen: list[RunningRequest] = []
    for request in reversed(requests):
        chosen.append(request)
        blocks -= request.blocks
        if blocks <= 0:
            return chosen
    return []
