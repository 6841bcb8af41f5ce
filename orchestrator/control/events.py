"""What the core is told. One event per outcome; all are values."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.domain.ids import Epoch, InstanceId, LeaderEpoch, RequestId
from orchestrator.domain.request import RequestState
from orchestrator.domain.view import ClusterView
from orchestrator.policy.migration import RunningRequest
from protos.contract.redis_names import Code


@dataclass(frozen=True, slots=True)
class Ticked:
    """The time that the core asked to be woken at has come."""


@dataclass(frozen=True, slots=True)
class Hinted:
    """Something changed in the store that the core decides on. Hints may be lost, doubled or merged."""


@dataclass(frozen=True, slots=True)
class ViewRead:
    """The answer to ReadView of that number."""

    number: int
    view: ClusterView


@dataclass(frozen=True, slots=True)
class AssignOutcome:
    """What became of one item of an Assign. Any code but OK: nothing changed for this request."""

    request_id: RequestId
    code: Code
    epoch: Epoch  # after the assignment


@dataclass(frozen=True, slots=True)
class AssignReplied:
    """The answer to Assign of that number, in the order of its items."""

    number: int
    outcomes: tuple[AssignOutcome, ...]


@dataclass(frozen=True, slots=True)
class RunningRead:
    """The answer to ReadRunning of that number."""

    number: int
    requests: tuple[RunningRequest, ...]


@dataclass(frozen=True, slots=True)
class MigrateReplied:
    """The answer to Migrate of that number, in the order of its items; the epochs are those of the moves."""

    number: int
    outcomes: tuple[AssignOutcome, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that a reap moved on: back to QUEUED, or to its end."""

    request_id: RequestId
    state: RequestState


@dataclass(frozen=True, slots=True)
class Reaped:
    """The answer to Reap."""

    now_ms: int
    requests: tuple[Ended, ...]
    lost: tuple[InstanceId, ...]


@dataclass(frozen=True, slots=True)
class LeadershipGained:
    """The answer to Lead of that number: this core leads, under an epoch that it did not hold before."""

    number: int
    epoch: LeaderEpoch
    now_ms: int


@dataclass(frozen=True, slots=True)
class LeadershipKept:
    """The answer to Lead of that number: this core leads on under the epoch that it holds."""

    number: int
    epoch: LeaderEpoch
    now_ms: int


@dataclass(frozen=True, slots=True)
class LeadershipDenied:
    """The answer to Lead of that number: another core leads."""

    number: int
    epoch: LeaderEpoch
    now_ms: int


@dataclass(frozen=True, slots=True)
class LeadershipLost:
    """The store refused a decision made under this epoch: another core leads since."""

    epoch: LeaderEpoch


@dataclass(frozen=True, slots=True)
class StoreLost:
    """The store did not answer, or could not write. Whether the call took effect is not known."""

    reason: str


@dataclass(frozen=True, slots=True)
class StoreBack:
    """The store answered again after a loss."""


Event = (
    Ticked
    | Hinted
    | ViewRead
    | AssignReplied
    | RunningRead
    | MigrateReplied
    | Reaped
    | LeadershipGained
    | LeadershipKept
    | LeadershipDenied
    | LeadershipLost
    | StoreLost
    | StoreBack
)
