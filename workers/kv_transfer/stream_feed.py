"""What one stream of a hand-off sends: its blocks as they become final, signs of life while none is, and maybe the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from protos.wire import kv
from workers.kv_transfer.bell import Bell
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.encodings import Encoding
from workers.kv_transfer.frames import Batch
from workers.kv_transfer.handoff_job import Ending, SendContext
from workers.kv_transfer.kv_source import KvSource
from workers.kv_transfer.measures import Measures
from workers.kv_transfer.push_codec import data_pieces, encode_other
from workers.kv_transfer.push_stream import PushStream
from workers.kv_transfer.striping import count_between

_MOST_NAMED_BYTES = 4 * 1024 * 1024  # of a shared pool in one message: the receiver copies these while the next are digested


@dataclass(slots=True)
class Supply:
    """What may go of a sequence. `ready` are the ids of its leading blocks that are final, as they were when they became
    so; it grows until `ending` is there. `bell` rings with every change, and when a receiver answers.
    """

    ready: list[int] = field(default_factory=list)
    ending: Ending | None = None
    bell: Bell = field(default_factory=Bell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the receiver granted: the streams, where each goes on, and the credit of each."""

    transfer_id: str
    request_id: str
    epoch: int
    credit_bytes: int
    next_blocks: tuple[int, ...]
    encoding: Encoding = Encoding.NONE
    mapped: bool = False  # the receiver reads the shared pool: frames may name bytes of it
    push_port: int = 0  # of the receiver's host, where Push is served as well

    @property
    def streams(self) -> int:
        """How many there are."""
        return len(self.next_blocks)


class StreamFeed:
    """One stream of one attempt. `open_call(number)` begins the Push call; it is begun with the first message."""

    def __init__(
        self,
        *,
        number: int,
        plan: Plan,
        supply: Supply,
        scope: DigestScope,
        context: SendContext,
        measures: Measures,
        open_call: Callable[[int], Any],
    ) -> None:
        self._number = number
        self._plan = plan
        self._supply = supply
        self._context = context
        self._measures = measures
        self._open_call = open_call
        self._next_block = plan.next_blocks[number]
        self._source = KvSource(context.port, scope, plan.encoding, context.segment() if plan.mapped else None)
        limit_bytes = min(context.frame_bytes, plan.credit_bytes // 2)
        self._batch = Batch(limit_bytes, min(_MOST_NAMED_BYTES, plan.credit_bytes // 2) if plan.mapped else 0)
        self._stream: PushStream | None = None

    @property
    def blocks_behind(self) -> int:
        """Blocks of this stream that may go and were not sent yet."""
        return count_between(self._number, self._plan.streams, self._next_block, len(self._supply.ready))

    def open(self) -> PushStream:
        """The stream, begun if it is not yet."""
        if self._stream is None:
            plan, context = self._plan, self._context
            self._stream = PushStream(
                self._open_call(self._number), plan.credit_bytes, context.progress_timeout_s, self._supply.bell.ring
            )
        return self._stream

    async def feed(self) -> None:
        """Sends every block of this stream; returns when the sequence has ended and all of them were sent.

        Raises what PushStream raises.
        """
        supply = self._supply
        while self._next_block < len(supply.ready) or supply.ending is None:
            if self._next_block >= len(supply.ready):
                await self._beat()
                continue
            with self._measures.busy(time.monotonic):
                await self._push_ready()

    async def end(self, end: kv.EndFrame) -> kv.Commit:
        """Sends the end and waits for the commit. Raises what PushStream raises."""
        stream = self.open()
        await stream.send([encode_other(self._plan.transfer_id, self._plan.epoch, end, self._number)])
        return await stream.commit()

    async def until_over(self) -> None:
        """Returns when the receiver has committed, or when nothing was sent here. Raises its refusal."""
        if self._stream is not None:
            await self._stream.until_over()

    def cut(self) -> None:
        """Ends the call, whatever its stage. Idempotent."""
        if self._stream is not None:
            self._stream.cut()

    async def close(self) -> None:
        """Ends the call, and waits until nothing of it runs here any more. Idempotent."""
        if self._stream is not None:
            await self._stream.close()

    async def _push_ready(self) -> None:
        """Puts the blocks that are ready into batches, which go out when they are full; the last one in any case."""
        batch, ready, source = self._batch, self._supply.ready, self._source
        while self._next_block < len(ready):
            index, block_id = self._next_block, ready[self._next_block]
            for group in range(self._context.port.layout.num_groups):
                await self._context.reach("handoff.mid_push")
                whole = source.whole(index, block_id, group, batch)
                for frame in await source.frames(index, block_id, group, batch) if whole is None else (whole,):
                    if not batch.offer(frame):
                        await self._flush()
                        assert batch.offer(frame), frame.size_bytes
            batch.completed.append(index)
            self._next_block += self._plan.streams
            if batch.full:
                await self._flush()
        await self._flush()

    async def _flush(self) -> None:
        """Sends what the batch holds; its blocks count as sent with that."""
        if not self._batch.frames:
            return
        frames, completed = self._batch.take()
        size, mapped = sum(frame.size_bytes for frame in frames), sum(frame.pool_bytes for frame in frames)
        plan, counters = self._plan, self._context.counters
        await self.open().send(data_pieces(plan.transfer_id, plan.epoch, frames, self._number), size)
        self._measures.bytes += size
        counters.kv_bytes_sent += size
        counters.kv_bytes_mapped += mapped
        counters.kv_blocks_sent += len(completed)
        self._measures.sent(completed)
        self._progress()

    async def _beat(self) -> None:
        """Waits for news; tells the receiver now and then that this side is alive while its engine is."""
        if self._stream is not None:
            self._stream.check()
        try:
            async with asyncio.timeout(self._context.progress_timeout_s / 4):
                await self._supply.bell.wait()
        except TimeoutError:
            if self._stream is not None and self._context.engine_alive():
                await self._stream.send([encode_other(self._plan.transfer_id, self._plan.epoch, stream=self._number)])
                self._progress()

    def _progress(self) -> None:
        self._context.on_progress(self._plan.request_id, self._plan.epoch)
