"""What the core wants done. Values; whoever carries one out reports exactly one event, or StoreLost."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.domain.ids import Epoch, Incarnation, InstanceId, LeaderEpoch, RequestId
from orchestrator.policy.placement import WaitReason
from orchestrator.policy.prefix_source import PrefixSource


@dataclass(frozen=True, slots=True)
class Lead:
    """Take or renew the leadership. Answer, with the same number: LeadershipGained, LeadershipKept or LeadershipDenied."""

    number: int
    epoch: LeaderEpoch  # 0: not leading
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class ReadView:
    """Read queue and instances. Answer: ViewRead with the same number."""

    number: int
    queue_limit: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """One request for one pair of instances. Refused by the store unless the request still has `expected_epoch`."""

    request_id: RequestId
    expected_epoch: Epoch
    prefill: InstanceId
    prefill_incarnation: Incarnation
    decode: InstanceId
    decode_incarnation: Incarnation
    prefill_blocks: int
    decode_blocks: int
    block_bytes: int = 0  # KV bytes of one block over all layers; 0: not known
    deadline_ms: int = 0  # of the request, on the clock of Redis
    prefix: PrefixSource | None = None  # who pushes cached blocks to the prefill instance first


@dataclass(frozen=True, slots=True)
class Assign:
    """One prefill batch: all items have one prefill instance. Answer: AssignReplied with the same number, or LeadershipLost."""

    number: int
    epoch: LeaderEpoch
    lease_ms: int
    items: tuple[Assignment, ...]


@dataclass(frozen=True, slots=True)
class ReadRunning:
    """Read what decodes on these instances. Answer: RunningRead with the same number."""

    number: int
    instances: tuple[InstanceId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """One running request for another instance. Refused by the store unless the request still has `expected_epoch`."""

    request_id: RequestId
    expected_epoch: Epoch
    move_epoch: Epoch
    source: InstanceId
    source_incarnation: Incarnation
    target: InstanceId
    target_incarnation: Incarnation
    blocks: int  # charged at the target
    most_blocks: int  # that it may ever fill
    block_bytes: int
    deadline_ms: int
    why: str
    note: str  # the figures behind it, for operators


@dataclass(frozen=True, slots=True)
class Migrate:
    """Begin these moves. Answer: MigrateReplied with the same number, or LeadershipLost."""

    number: int
    epoch: LeaderEpoch
    max_migrations: int
    items: tuple[Moved, ...]


@dataclass(frozen=True, slots=True)
class Reap:
    """Requeue what is overdue and end what is late. Answer: Reaped, or LeadershipLost."""

    epoch: LeaderEpoch
    limit: int
    max_attempts: int
    lost_ms: int
    retain_ms: int


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Deliver Ticked at this time, unless a later WakeAt replaces this one. No answer."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Explain:
    """Why a request stays in the queue, told when the reason changes. For the story only; no answer."""

    request_id: RequestId
    reason: WaitReason


Effect = Lead | ReadView | Assign | ReadRunning | Migrate | Reap | WakeAt | Explain
