"""Where a request is prefilled and where it decodes: filter, score, pick.

Everything here is a pure function of frozen values. Ties go to the smaller instance id, so the same view always
gives the same placement.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.domain.ids import InstanceId
from orchestrator.domain.view import QueuedRequest
from orchestrator.policy.admission import (
    AdmissionLimits,
    could_decode,
    could_prefill,
    has_decode_room,
    has_local_room,
    has_prefill_room,
)
from orchestrator.policy.load import Load, prefill_blocks, whole_blocks
from orchestrator.policy.prefix_source import PrefixRules


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementRules:
    """What the operator decides."""

    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    local_prefill: bool = True  # a decode instance prefills while no prefill instance is READY
    prefix: PrefixRules = field(default_factory=PrefixRules)


@dataclass(frozen=True, slots=True)
class Placement:
    """One pair and what it reserves. The same instance twice: no hand-off, and its blocks are counted once, as decode."""

    prefill: InstanceId
    decode: InstanceId
    prefill_blocks: int
    decode_blocks: int

    @property
    def is_local(self) -> bool:
        """True when one instance does both."""
        return self.prefill == self.decode


class WaitReason(StrEnum):
    """Why a request stays in the queue."""

    NO_PREFILL_INSTANCE = "no prefill instance of its model is ready"
    NO_DECODE_INSTANCE = "no decode instance of its model is ready"
    NEVER_FITS = "it needs more KV blocks or context than any ready instance has"
    PREFILL_BUSY = "every prefill instance has its window of tokens or blocks filled"
    DECODE_FULL = "no decode instance has the KV blocks or a free sequence"
    HELD = "the only room is held for an older request that needs more"


@dataclass(frozen=True, slots=True)
class Candidates:
    """Filter: the instances of one model that take work, by what they may do, best first."""

    prefill: Sequence[Load]  # of role prefill, by prefill_score
    decode: Sequence[Load]  # may decode what another instance prefilled, by decode_score
    local: Sequence[Load]  # may do both for one request, by prefill_score


def prefill_score(load: Load) -> tuple[int, int, str]:
    """Less is better: tokens waiting in front of the request."""
    return (load.prefill_tokens, load.prefill_requests, load.instance.instance_id)


def decode_score(load: Load) -> tuple[float, int, str]:
    """Less is better: share of the KV pool that is promised away, then requests in either role."""
    share = load.reserved_blocks / load.capabilities.total_blocks
    return (share, load.decode_requests + load.prefill_requests, load.instance.instance_id)


NOBODY: frozenset[InstanceId] = frozenset()


def tokens_before_first(request: QueuedRequest, load: Load) -> int:
    """Less is better: tokens to compute there until the request's first one, but for those that any instance computes."""
    return load.prefill_tokens - request.cached_blocks(load.instance.instance_id) * load.capabilities.block_tokens


def _soonest_first(request: QueuedRequest, loads: Sequence[Load]) -> Sequence[Load]:
    """By tokens to compute; the order of `loads`, which is that of the tokens waiting, decides between equals."""
    if not request.cached:
        return loads
    return sorted(loads, key=lambda load: tokens_before_first(request, load))


def place(
    request: QueuedRequest,
    candidates: Candidates,
    rules: PlacementRules,
    barred: Collection[InstanceId] = NOBODY,
) -> Placement | WaitReason:
    """The best pair that has room now and is not barred, or why there is none.

    Doing both on one instance wins when no more tokens are to be computed there than on the best prefill instance: it saves
    the hand-off.
    """
    limits = rules.admission
    local = next(
        (
            load
            for load in _soonest_first(request, candidates.local)
            if has_local_room(request, load, limits) and could_decode(request, load) and load.instance.instance_id not in barred
        ),
        None,
    )
    split = _best_pair(request, candidates, limits, barred)
    if split is not None and (local is None or tokens_before_first(request, split[0]) < tokens_before_first(request, local)):
        source, target = split
        return Placement(
            source.instance.instance_id,
            target.instance.instance_id,
            prefill_blocks(request, source.capabilities),
            whole_blocks(request, target.capabilities),
        )
    if local is not None:
        name = local.instance.instance_id
        return Placement(name, name, 0, whole_blocks(request, local.capabilities))
    if barred and isinstance(place(request, candidates, rules), Placement):
        return WaitReason.HELD
    return _why_not(request, candidates, limits)


def _best_pair(
    request: QueuedRequest, candidates: Candidates, limits: AdmissionLimits, barred: Collection[InstanceId]
) -> tuple[Load, Load] | None:
    def sends(load: Load) -> bool:
        return (
            has_prefill_room(request, load, limits) and could_prefill(request, load) and load.instance.instance_id not in barred
        )

    def receives(load: Load) -> bool:
        return has_decode_room(request, load) and could_decode(request, load) and load.instance.instance_id not in barred

    return _first_pair(filter(sends, _soonest_first(request, candidates.prefill)), candidates.decode, receives)


def _first_pair(sources: Iterable[Load], targets: Sequence[Load], receives: Callable[[Load], bool]) -> tuple[Load, Load] | None:
    """The first source that has a target of its fingerprint, with the first such target."""
    without_target: set[str] = set()
    for source in sources:
        fingerprint = source.capabilities.fingerprint
        if fingerprint in without_target:
            continue
        for target in targets:
            if target.capabilities.fingerprint == fingerprint and receives(target):
                return source, target
        without_target.add(fingerprint)
    return None


def shortest_wait(request: QueuedRequest, candidates: Candidates) -> tuple[Load, Load] | None:
    """The pair that would suit the request best if it were idle, once or twice the same; None when none could ever take it.

    Between doing both on one instance and a pair, the emptier KV pool wins: blocks take longest to come free.
    """
    sources = [load for load in candidates.prefill if could_prefill(request, load)]
    split = _first_pair(sources, candidates.decode, lambda load: could_decode(request, load))
    local = min((load for load in candidates.local if could_decode(request, load)), key=decode_score, default=None)
    if local is not None and (split is None or decode_score(local) <= decode_score(split[1])):
        return local, local
    return split


def _why_not(request: QueuedRequest, candidates: Candidates, limits: AdmissionLimits) -> WaitReason:
    if not candidates.decode:
        return WaitReason.NO_DECODE_INSTANCE
    if not candidates.prefill and not candidates.local:
        return WaitReason.NO_PREFILL_INSTANCE
    if shortest_wait(request, candidates) is None:
        return WaitReason.NEVER_FITS
    if any(has_decode_room(request, load) for load in candidates.decode):
        return WaitReason.PREFILL_BUSY
    return WaitReason.DECODE_FULL
