"""What the receiver asks of the process around it, and the bounds it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from protos.contract.errors import AutanError
from protos.wire import common
from workers.kv_transfer.claims import Addressee, Expectation


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A sequence that is about to decode here. `timeline` is complete up to the commit."""

    request_id: str
    epoch: int
    next_token_ids: tuple[int, ...]
    first_output_index: int
    timeline: common.Timeline
    next_logprobs: tuple[bytes, ...] = ()  # packed, of next_token_ids; empty: none
    is_exact: bool = True  # its rows are those that this instance would have computed


class ReceiverHooks(Protocol):
    """What the receiver asks of the process around it."""

    def here(self) -> Addressee:
        """Who this process is now."""
        ...

    async def expect(self, request_id: str, epoch: int) -> Expectation:
        """The assignment of a request to this instance. Raises StaleEpoch when there is none of that epoch."""
        ...

    def is_expected(self, request_id: str, epoch: int) -> bool:
        """True while that assignment stands."""
        ...

    async def commit(self, request_id: str, epoch: int) -> None:
        """Makes this instance the holder in Redis. Raises a FenceError when it may not be, StoreUnavailable."""
        ...

    def opened(self, request_id: str, epoch: int) -> None:
        """Blocks are reserved."""
        ...

    def arrived(self, sequence: Arrived) -> None:
        """Redis has this instance as the holder. The engine may have sampled tokens behind those of the sequence already."""
        ...

    def ended(self, request_id: str, epoch: int, error: AutanError) -> None:
        """The transfer is over without a commit; its blocks are on their way back."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiveLimits:
    """Bounds of one receiver; times in seconds. A committed transfer answers repeated opens for `remember_s`.

    A transfer has at most `streams`, which share its window.
    """

    window_bytes: int
    streams: int
    progress_timeout_s: float
    remember_s: float

    def deadline_s(self, touched_s: float) -> float:
        """When a transfer that was touched then, in monotonic time, is a leak."""
        return touched_s + 2 * self.progress_timeout_s
