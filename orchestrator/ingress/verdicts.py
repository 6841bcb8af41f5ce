"""What Redis says of a request, held against the stream that is here. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.ingress.records import lost_error, outcome_of
from orchestrator.ingress.streams import Outcome, RequestStream
from orchestrator.store.replies import Look
from protos.contract.errors import EngineFailure, UnavailableError


@dataclass(frozen=True, slots=True)
class Ended:
    """The request is terminal, or there is no way on: the stream ends like this."""

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Superseded:
    """A newer epoch began when the journal held `journaled` tokens."""

    epoch: int
    journaled: int


@dataclass(frozen=True, slots=True)
class NotOurs:
    """Another registration owns the request at this epoch."""


@dataclass(frozen=True, slots=True)
class Behind:
    """Redis has tokens of the request that are not here."""


@dataclass(frozen=True, slots=True)
class Running:
    """Nothing to do."""


Judgement = Ended | Superseded | NotOurs | Behind | Running


def judge(stream: RequestStream, look: Look, refused_epoch: int | None = None) -> Judgement:
    """Compares a look with the stream. `refused_epoch`: Redis just called a write of ours under this epoch stale."""
    if not look.is_known:
        return Ended(lost_error(stream.request_id))
    if look.has_ended:
        outcome = outcome_of(stream.request_id, look.state, look.reason, look.error, stream.ending)
        return Ended(outcome or moved_error(stream.request_id))
    if look.epoch > stream.epoch:
        return Superseded(look.epoch, look.n)
    if refused_epoch is not None and look.epoch == refused_epoch:
        return NotOurs()
    return Behind() if look.n > stream.accepted else Running()


def diverged_error(request_id: str) -> EngineFailure:
    """Two workers disagree about a token that was accepted: nothing after it can be trusted."""
    return EngineFailure(f"request {request_id}: a repeated token differs from the accepted one; send it again under a new id")


def moved_error(request_id: str) -> UnavailableError:
    """For clients of a request that another ingress took over."""
    return UnavailableError(f"request {request_id} is served by another ingress since: resume it there")
