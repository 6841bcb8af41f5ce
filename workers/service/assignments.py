"""What this worker takes part in: one assignment for each request, with its stage. Pure state, no effects.

    part      stages

    prefill   PREFILLING ──► HANDING_OVER ──► ENDED            (the peer is the holder)
              PREFILLING ──► FINISHED ──► ENDED                (the first token ended the request)
    decode    EXPECTING ◄──► IMPORTING ──► DECODING ──► FINISHED ──► ENDED
    full      PREFILLING ──► DECODING ──► FINISHED ──► ENDED
              PREFILLING ──► FINISHED ──► ENDED

Every stage may go to ENDED: revoked, failed, fenced. FINISHED waits until the ingress has journaled the last token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from protos.wire import common
from workers.engine_api.types import EngineRequest, TokenOut
from workers.kv_transfer.lifecycle import Lifecycle

_FENCES_KEPT = 4096


class Part(StrEnum):
    """What this worker does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    FULL = "full"


class Stage(StrEnum):
    """How far it is."""

    PREFILLING = "prefilling"
    HANDING_OVER = "handing_over"
    EXPECTING = "expecting"
    IMPORTING = "importing"
    DECODING = "decoding"
    FINISHED = "finished"
    ENDED = "ended"


STAGE_MOVES: Mapping[Stage, frozenset[Stage]] = {
    Stage.PREFILLING: frozenset({Stage.HANDING_OVER, Stage.DECODING, Stage.FINISHED, Stage.ENDED}),
    Stage.HANDING_OVER: frozenset({Stage.ENDED}),
    Stage.EXPECTING: frozenset({Stage.IMPORTING, Stage.ENDED}),
    Stage.IMPORTING: frozenset({Stage.EXPECTING, Stage.DECODING, Stage.ENDED}),
    Stage.DECODING: frozenset({Stage.FINISHED, Stage.ENDED}),
    Stage.FINISHED: frozenset({Stage.ENDED}),
    Stage.ENDED: frozenset(),
}

FIRST_STAGE: Mapping[Part, Stage] = {
    Part.PREFILL: Stage.PREFILLING,
    Part.DECODE: Stage.EXPECTING,
    Part.FULL: Stage.PREFILLING,
}

_EXPECTS = frozenset({Stage.EXPECTING, Stage.IMPORTING})
_IN_ENGINE = frozenset({Stage.PREFILLING, Stage.DECODING})


@dataclass(slots=True, kw_only=True, eq=False)
class Assignment:
    """One request here. `peer` is the other side of the hand-off; the times are monotonic seconds."""

    request: EngineRequest
    part: Part
    peer_instance: str
    peer_address: str
    peer_incarnation: int
    ingress_address: str
    queued_s: float
    attempts: int
    started_s: float
    progress_s: float
    is_move: bool = False  # it decodes at the peer and comes here
    is_exact: bool = True  # its rows came as they were computed; false also when they were computed again later
    chunks: int = 0
    cached_tokens: int = 0
    fetched_tokens: int = 0  # of the prompt, from the cache of `fetch_source`
    fetch_source: str = ""
    fetch_s: float = 0.0
    capability: bytes = b""  # of the hand-off to the peer
    timeline: common.Timeline | None = None
    early: list[TokenOut] = field(default_factory=list)  # sampled here before Redis said that it may decode here
    lifecycle: Lifecycle[Stage] = field(init=False)

    def __post_init__(self) -> None:
        self.lifecycle = Lifecycle(STAGE_MOVES, FIRST_STAGE[self.part])

    @property
    def request_id(self) -> str:
        """Names the request."""
        return self.request.request_id

    @property
    def epoch(self) -> int:
        """The assignment's epoch: everything said for the request carries it."""
        return self.request.epoch

    @property
    def stage(self) -> Stage:
        """How far it is."""
        return self.lifecycle.state

    @property
    def ended(self) -> bool:
        """True when it was dropped, handed over or finished: nothing may be done for it any more."""
        return self.lifecycle.ended

    @property
    def holds(self) -> bool:
        """True when this worker keeps the lease in Redis; otherwise it expects the request."""
        return self.stage not in _EXPECTS


class Assignments:
    """All assignments of one worker, and the epochs below which nothing is taken on any more."""

    def __init__(self) -> None:
        self._live: dict[str, Assignment] = {}
        self._fences: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def all(self) -> tuple[Assignment, ...]:
        """Everything here, oldest first."""
        return tuple(self._live.values())

    def get(self, request_id: str, epoch: int | None = None) -> Assignment | None:
        """The assignment of a request, of this epoch when one is given."""
        found = self._live.get(request_id)
        return found if found is not None and epoch in (None, found.epoch) else None

    def is_stale(self, request_id: str, epoch: int) -> bool:
        """True when this epoch was revoked, has ended here, or is older than what is here."""
        found = self._live.get(request_id)
        return epoch <= self._fences.get(request_id, 0) or (found is not None and epoch < found.epoch)

    def take(self, assignment: Assignment) -> None:
        """Takes a request on. An assertion fails when another assignment of it is here: end that one first."""
        assert assignment.request_id not in self._live, assignment.request_id
        assert not self.is_stale(assignment.request_id, assignment.epoch), assignment.request_id
        self._live[assignment.request_id] = assignment

    def end(self, assignment: Assignment) -> None:
        """Ends an assignment: its epoch and older ones are stale from now on. Raises IllegalMove when it has ended."""
        assignment.lifecycle.move(Stage.ENDED)
        del self._live[assignment.request_id]
        self.fence(assignment.request_id, assignment.epoch)

    def fence(self, request_id: str, up_to_epoch: int) -> None:
        """Makes epochs stale. The latest few thousand requests are remembered; Redis knows the rest."""
        self._fences[request_id] = max(up_to_epoch, self._fences.pop(request_id, 0))
        if len(self._fences) > _FENCES_KEPT:
            self._fences.popitem(last=False)

    def stuck(self, now_s: float, timeout_s: float) -> tuple[Assignment, ...]:
        """Those that an idle engine should be computing but has not touched for `timeout_s`."""
        return tuple(a for a in self._live.values() if a.stage in _IN_ENGINE and now_s - a.progress_s > timeout_s)
