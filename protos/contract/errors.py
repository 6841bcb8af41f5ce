"""The errors of Autan, as one tree.

AutanError
├── ConfigError            INVALID_ARGUMENT     exit 2   a file, key or flag is wrong
├── RequestError           INVALID_ARGUMENT     exit 2   one request is wrong; nothing else suffers
│   ├── InvalidRequest     INVALID_ARGUMENT
│   ├── PromptTooLong      OUT_OF_RANGE
│   ├── UnknownModel       NOT_FOUND
│   ├── UnknownRequest     NOT_FOUND
│   ├── RequestConflict    ALREADY_EXISTS       same id, another body
│   └── ResumeGone         FAILED_PRECONDITION  the tokens asked for are no longer kept
├── AuthError
│   ├── Unauthenticated    UNAUTHENTICATED      exit 4
│   └── Forbidden          PERMISSION_DENIED    exit 4
├── CapacityError          RESOURCE_EXHAUSTED   exit 4   retryable, with retry_after_s
│   ├── QueueFull
│   ├── OutOfBlocks
│   └── StoreFull
├── UnavailableError       UNAVAILABLE          exit 3   retryable
│   ├── StoreUnavailable
│   ├── NoInstance
│   ├── PeerUnavailable
│   └── ClusterUnreachable
├── FenceError             ABORTED
│   ├── StaleEpoch         another holder has the request
│   ├── StaleIncarnation   another process has the instance
│   └── NotLeader
├── HandoffError
│   ├── FingerprintMismatch  FAILED_PRECONDITION
│   ├── BadFrame             INVALID_ARGUMENT
│   ├── DigestMismatch       DATA_LOSS          retryable
│   └── HandoffTimeout       DEADLINE_EXCEEDED  retryable
├── EndedError             (how a request that was accepted ended without a result)
│   ├── DeadlineExceeded   DEADLINE_EXCEEDED
│   ├── Cancelled          CANCELLED
│   ├── PoisonRequest      ABORTED              it ended every worker that held it
│   └── EngineFailure      INTERNAL
├── ModelError             FAILED_PRECONDITION  exit 2   a checkpoint cannot be used
├── ImpossiblePrediction   INTERNAL             exit 1   a prediction beyond the peaks of the hardware
└── InternalError          INTERNAL

`code` is the gRPC status name, `reason` the class in SCREAMING_SNAKE_CASE; both travel in
`autan.v1.ErrorDetail` and in `google.rpc.ErrorInfo`. Programmer errors are assertions, not part of the tree.
"""

from __future__ import annotations

import re
from typing import ClassVar


class AutanError(Exception):
    """Root of the tree.

    The message says what was wrong, where (key path, tensor name, request id) and what to do about it.
    Arguments survive pickling: every subclass is rebuilt from `(message, retry_after_s)`.
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    @property
    def reason(self) -> str:
        """The class name in SCREAMING_SNAKE_CASE."""
        return reason_of(type(self))


def reason_of(error: type[AutanError]) -> str:
    """The wire name of an error class."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", error.__name__).upper()


class ConfigError(AutanError):
    """A file, key or flag is wrong."""

    code = "INVALID_ARGUMENT"
    exit_code = 2


class RequestError(AutanError):
    """One request is wrong; nothing else suffers."""

    code = "INVALID_ARGUMENT"
    exit_code = 2


class InvalidRequest(RequestError):
    """A field of the request is out of its range."""


class PromptTooLong(RequestError):
    """Prompt and output do not fit the context."""

    code = "OUT_OF_RANGE"


class UnknownModel(RequestError):
    """No model of that name is served."""

    code = "NOT_FOUND"


class UnknownRequest(RequestError):
    """The caller's tenant has no request of that id."""

    code = "NOT_FOUND"


class RequestConflict(RequestError):
    """The id is taken by a request with another body."""

    code = "ALREADY_EXISTS"


class ResumeGone(RequestError):
    """The tokens asked for are not kept any more, or not there yet."""

    code = "FAILED_PRECONDITION"


class AuthError(AutanError):
    """The caller may not do this."""

    code = "UNAUTHENTICATED"
    exit_code = 4


class Unauthenticated(AuthError):
    """No key, a wrong key or an expired key."""


class Forbidden(AuthError):
    """The key's role does not reach this method."""

    code = "PERMISSION_DENIED"


class CapacityError(AutanError):
    """Refused before resources run short; come back after `retry_after_s`."""

    code = "RESOURCE_EXHAUSTED"
    retryable = True
    exit_code = 4


class QueueFull(CapacityError):
    """The queue, or the tenant's share of it, is full."""


class OutOfBlocks(CapacityError):
    """The KV pool cannot take the sequence now."""


class StoreFull(CapacityError):
    """Redis is at its memory limit."""


class UnavailableError(AutanError):
    """Something that should answer does not."""

    code = "UNAVAILABLE"
    retryable = True
    exit_code = 3


class StoreUnavailable(UnavailableError):
    """Redis cannot be reached or cannot write."""


class NoInstance(UnavailableError):
    """No instance of the needed role and model is ready."""


class PeerUnavailable(UnavailableError):
    """A worker cannot be reached."""


class ClusterUnreachable(UnavailableError):
    """No orchestrator answers at the endpoint."""


class FenceError(AutanError):
    """A stale actor tried to change something."""

    code = "ABORTED"


class StaleEpoch(FenceError):
    """The request has another holder since."""


class StaleIncarnation(FenceError):
    """The instance runs in another process since."""


class NotLeader(FenceError):
    """Another core leads since."""


class HandoffError(AutanError):
    """KV could not be handed over."""

    code = "ABORTED"


class FingerprintMismatch(HandoffError):
    """Sender and receiver do not serve the same thing; the differing fields are named."""

    code = "FAILED_PRECONDITION"


class BadFrame(HandoffError):
    """A frame is out of order, out of range or of the wrong size."""

    code = "INVALID_ARGUMENT"


class DigestMismatch(HandoffError):
    """The bytes of a block are not those that were sent."""

    code = "DATA_LOSS"
    retryable = True


class HandoffTimeout(HandoffError):
    """The hand-off made no progress in time."""

    code = "DEADLINE_EXCEEDED"
    retryable = True


class EndedError(AutanError):
    """An accepted request ended without a result."""


class DeadlineExceeded(EndedError):
    """The request's time was up."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(EndedError):
    """The client or an operator cancelled the request."""

    code = "CANCELLED"


class PoisonRequest(EndedError):
    """The request ended every worker that held it."""

    code = "ABORTED"


class EngineFailure(EndedError):
    """The engine failed on this request."""


class ModelError(AutanError):
    """A checkpoint or model file is missing, damaged or of an unknown kind."""

    code = "FAILED_PRECONDITION"
    exit_code = 2


class ImpossiblePrediction(AutanError):
    """A predicted time implies more than a peak of the hardware: a wrong unit, constant or description."""


class InternalError(AutanError):
    """A bug; the message carries an opaque id that the log explains."""


def _tree(root: type[AutanError]) -> dict[str, type[AutanError]]:
    found = {reason_of(root): root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def error_from(reason: str, message: str, retry_after_s: float = 0.0) -> AutanError:
    """Rebuilds the error that a peer named; an unknown reason becomes InternalError with the reason in its text."""
    known = _tree(AutanError).get(reason)
    if known is None:
        return InternalError(f"{reason}: {message}", retry_after_s)
    return known(message, retry_after_s)
