"""What the store answers and what batches are made of. Times are ms of the server's clock; states are those of the library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from protos.contract.redis_names import Code

TERMINAL = frozenset({"DONE", "FAILED", "CANCELLED", "EXPIRED", "DEAD"})


@dataclass(frozen=True, slots=True)
class IngressReply:
    """OK with the epoch of the registration, or STALE."""

    code: Code
    epoch: int = 0
    now_ms: int = 0


@dataclass(frozen=True, slots=True)
class SubmitReply:
    """OK, DUPLICATE (the request as it is), CONFLICT, or FULL with the length of the queue."""

    code: Code
    state: str = ""
    epoch: int = 0
    n: int = 0
    now_ms: int = 0
    queued: int = 0


@dataclass(frozen=True, slots=True)
class CancelReply:
    """OK, DUPLICATE (it had ended as `state`), or GONE."""

    code: Code
    state: str = ""


@dataclass(frozen=True, slots=True)
class ResumeReply:
    """OK, GONE, GAP (only `n` is set: fewer tokens than asked for), or STALE (an ended registration wanted to take it).

    `tokens` are packed uint32 from the index asked for up to `n`; `error` is a StoredError, `spec` a RequestSpec.
    """

    code: Code
    state: str = ""
    epoch: int = 0
    n: int = 0
    tokens: bytes = b""
    reason: str = ""
    error: bytes = b""
    spec: bytes = b""


@dataclass(frozen=True, slots=True)
class Emission:
    """Tokens of one request for the journal; `tokens` are packed uint32, the first has output index `first_index`."""

    request_id: str
    epoch: int
    first_index: int
    tokens: bytes


@dataclass(frozen=True, slots=True)
class EmitOutcome:
    """OK or DUPLICATE: everything below `next_index` is journaled. STALE, STATE, GONE, GAP, DIVERGED: nothing changed."""

    code: Code
    next_index: int


@dataclass(frozen=True, slots=True)
class FinishReply:
    """OK, DUPLICATE, STALE, STATE, GAP (`n` tokens are journaled), or GONE."""

    code: Code
    state: str = ""
    n: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """One request; `state` is empty when the store does not know it."""

    state: str
    epoch: int = 0
    n: int = 0
    reason: str = ""
    error: bytes = b""

    @property
    def is_known(self) -> bool:
        """False for an id that was never submitted, or was forgotten after its retention."""
        return self.state != ""

    @property
    def has_ended(self) -> bool:
        """True in a terminal state."""
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class LeadReply:
    """`leads`: the caller is the leader under `epoch`; else another one is."""

    epoch: int
    leads: bool
    now_ms: int


@dataclass(frozen=True, slots=True)
class QueuedRecord:
    """One QUEUED request, in queue order."""

    request_id: str
    epoch: int
    prompt_tokens: int
    max_tokens: int
    n: int  # journaled tokens; they are prefilled with the prompt
    prio: int
    submitted_ms: int
    deadline_ms: int
    tenant: str
    model: str
    attempts: int


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """One instance; `card` is an InstanceCard, `stats` an InstanceStats."""

    instance_id: str
    role: str
    addr: str
    incarnation: int
    state: str
    beat_ms: int
    want_drain: bool
    p_requests: int
    p_tokens: int
    p_blocks: int
    d_requests: int
    d_blocks: int
    m_in: int  # moves to it that are open
    m_out: int
    card: bytes
    stats: bytes


@dataclass(frozen=True, slots=True)
class View:
    """Queue and instances in one consistent picture."""

    now_ms: int
    queued_total: int
    queued: tuple[QueuedRecord, ...]
    instances: tuple[InstanceRecord, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one queued request shall run; prefill and decode may be the same instance."""

    request_id: str
    expected_epoch: int
    p_inst: str
    p_inc: int
    d_inst: str
    d_inc: int
    p_blocks: int
    d_blocks: int
    capability: bytes = b""  # of the hand-off, for the prefill instance to show
    s_inst: str = ""  # pushes the first s_blocks full blocks to the prefill instance; nobody when empty
    s_inc: int = 0
    s_blocks: int = 0
    s_wait_ms: int = 0
    s_capability: bytes = b""


@dataclass(frozen=True, slots=True)
class Migration:
    """Where one decoding request shall move; `blocks` are charged to the target, at least those charged where it is."""

    request_id: str
    expected_epoch: int
    target: str
    target_inc: int
    blocks: int
    move_epoch: int
    capability: bytes = b""  # of the move, for the source to show
    why: str = "operator"  # a name
    note: str = ""  # the figures behind it, for operators; cut after 256 bytes


@dataclass(frozen=True, slots=True)
class AssignOutcome:
    """OK with the new epoch; STALE, STATE or GONE with the epoch that the request has (0 when GONE)."""

    code: Code
    epoch: int


@dataclass(frozen=True, slots=True)
class Reaped:
    """A request that ran out of time and what became of it: QUEUED, DEAD or EXPIRED."""

    request_id: str
    state: str


@dataclass(frozen=True, slots=True)
class ReapReply:
    """What one call ended; `lost` are the instances that became LOST."""

    now_ms: int
    requests: tuple[Reaped, ...]
    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """One request that has not ended; `p` and `d` are empty while it is QUEUED."""

    request_id: str
    tenant: str
    state: str
    epoch: int
    prompt_tokens: int
    n: int
    p: str
    d: str
    submitted_ms: int
    attempts: int
    max_tokens: int
    deadline_ms: int
    next_epoch: int  # that a move, or the next placement, has
    moves: int  # begun so far
    move_target: str  # of the move that is open; empty: none is
    d_blocks: int  # charged where it decodes


@dataclass(frozen=True, slots=True)
class RequestList:
    """Live requests, oldest first."""

    now_ms: int
    requests: tuple[LiveRequest, ...]


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """One line of the log of moves. `event`: begun, moved or stayed; `why` and `note` as the move was asked for."""

    at_ms: int
    event: str
    request_id: str
    epoch: int
    source: str
    target: str
    why: str
    note: str


@dataclass(frozen=True, slots=True)
class MoveLog:
    """The last moves, newest first."""

    now_ms: int
    records: tuple[MoveRecord, ...]


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Gauges, and totals since the store was created; `generation` changes when it was wiped."""

    queued: int
    live: int
    leader: str
    leader_epoch: int
    generation: int
    totals: Mapping[str, int]
