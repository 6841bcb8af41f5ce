"""What an outgoing hand-off is told, and what it needs of the process around it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from protos.wire import common
from workers.engine_api.pool_memory import PoolSegment
from workers.engine_api.types import EngineRequest
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.encodings import Compression
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.push_calls import Dial


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a request, as Redis says."""

    epoch: int
    state: str
    instance_id: str
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffJob:
    """One request on its way from one instance to another."""

    request: EngineRequest
    source_instance: str
    source_incarnation: int
    target_instance: str
    target_incarnation: int
    fingerprint: common.Fingerprint
    capability: bytes = b""  # serialised kv.Capability; empty where none is needed
    ahead_tokens: int = 0  # rows that may come on top: the request decodes at the source while it moves
    source_epoch: int | None = None  # of a move: the source holds the request at this epoch until the commit
    is_exact: bool = True  # the source has the rows that it would have computed itself

    @property
    def num_tokens(self) -> int:
        """KV rows to hand over at most: everything that was known at the beginning, and what may come on top."""
        return len(self.request.prompt) + len(self.request.output) + self.ahead_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What the target needs to go on. `prefill_ended_s` is monotonic time; of a move it is when the source paused."""

    next_token_ids: tuple[int, ...]
    first_output_index: int
    timeline: common.Timeline
    prefill_ended_s: float
    next_logprobs: tuple[bytes, ...] = ()  # packed, of next_token_ids; empty: none
    num_tokens: int | None = None  # KV rows in all, when there are fewer than the job makes room for


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffResult:
    """What a committed hand-off took. `exposed_s` is the end of the prefill, or the pause of a move, to the commit."""

    blocks: int
    reused_blocks: int
    bytes: int
    transfer_s: float
    exposed_s: float


async def _pass(point: str) -> None:
    del point


@dataclass(frozen=True, slots=True, kw_only=True)
class SendContext:
    """What all hand-offs of one process share. Times are seconds; `open_patience_s` bounds waiting for room or for the peer.

    A hand-off uses at most `streams`, one for each full `stream_bytes` of the sequence.
    """

    port: EnginePort
    holder_of: Callable[[str], Awaitable[Holder | None]]
    counters: TransferCounters
    frame_bytes: int
    streams: int
    stream_bytes: int
    progress_timeout_s: float
    open_patience_s: float
    compression: Compression = "none"  # what this side is configured for; the receiver chooses
    segment: Callable[[], PoolSegment | None] = lambda: None  # the pool, where other processes may map it
    dial: Dial | None = None  # to a port that the receiver serves Push on; without it Push goes where Open went
    engine_alive: Callable[[], bool] = lambda: True
    reach: Callable[[str], Awaitable[None]] = _pass
    on_progress: Callable[[str, int], None] = lambda request_id, epoch: None
