"""The sending side of hand-offs: pushes finished blocks of a request while its later chunks still compute.

The receiver's commit makes it the holder. When the reply is lost, the truth is in Redis, so the sender asks there before it
opens again; opening again with the same request, epoch and incarnation continues the same transfer.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio

from protos.contract.errors import (
    AutanError,
    BadFrame,
    CapacityError,
    DigestMismatch,
    FenceError,
    HandoffTimeout,
    PeerUnavailable,
    StaleEpoch,
)
from protos.contract.redis_names import pack_tokens
from protos.rpc import kv_pb2_grpc
from protos.wire import common, fingerprint_key, kv
from workers.kv_transfer.block_names import sequence_hashes
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.frames import Batch, split
from workers.kv_transfer.handoff_job import Ending, HandoffJob, HandoffResult, SendContext
from workers.kv_transfer.lifecycle import Lifecycle, SendState, sending
from workers.kv_transfer.measures import Measures
from workers.kv_transfer.push_codec import encode_data, encode_other
from workers.kv_transfer.push_stream import PushStream, stream_error

_OPEN_BACKOFF_S = (0.05, 0.25)
_CLOSE_TIMEOUT_S = 1.0
PUSH_METHOD = "/autan.v1.KvTransfer/Push"


def _stub(channel: grpc.aio.Channel) -> Any:
    make: Any = kv_pb2_grpc.KvTransferStub
    return make(channel)


def _push_call(channel: grpc.aio.Channel) -> Any:
    """Messages go out as the codec made them."""
    return channel.stream_stream(PUSH_METHOD, request_serializer=None, response_deserializer=kv.PushReply.FromString)


class Handoff:
    """One hand-off. `blocks_ready` and `end` feed it, `run` carries it out; the caller gives the blocks back afterwards.

    `run` may be cancelled at any point: nothing is exported after that. `lifecycle` is then not COMMITTED, and the caller
    aborts it.
    """

    def __init__(self, job: HandoffJob, channel: grpc.aio.Channel, context: SendContext) -> None:
        self.job = job
        self.lifecycle: Lifecycle[SendState] = sending()
        self._stub = _stub(channel)
        self._push_call = _push_call(channel)
        self._context = context
        self._scope = DigestScope(fingerprint_key(job.fingerprint), job.request.request_id, job.request.epoch)
        self._ready: list[int] = []  # ids of the leading blocks that are final, as they were when they became so
        self._ending: Ending | None = None
        self._wake = asyncio.Event()
        self._transfer_id = ""
        self._measures = Measures()
        self._next_block = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole sequence, the partial one included; of a move, the most that it may have."""
        return -(-self.job.num_tokens // self._context.port.layout.block_tokens)

    @property
    def blocks_behind(self) -> int:
        """Blocks that may go and were not sent yet; all of them before the receiver has answered."""
        return len(self._ready) - self._next_block

    def blocks_ready(self, computed_tokens: int, block_ids: tuple[int, ...]) -> None:
        """The first `computed_tokens` rows are final, in pinned `block_ids`: their full blocks may go, and when these are
        all rows of a prefill the partial one too.

        A sequence that was preempted comes again in other blocks; those that were reported before stay pinned and good.
        """
        is_all = self.job.source_epoch is None and computed_tokens >= self.job.num_tokens
        full = computed_tokens // self._context.port.layout.block_tokens
        self._extend(self.num_blocks if is_all else full, block_ids)

    def end(self, ending: Ending, block_ids: tuple[int, ...]) -> None:
        """All rows are final: what is left of them may go, and then the end frame."""
        self._ending = ending
        rows = self.job.num_tokens if ending.num_tokens is None else ending.num_tokens
        self._extend(-(-rows // self._context.port.layout.block_tokens), block_ids)

    def _extend(self, num_ready: int, block_ids: tuple[int, ...]) -> None:
        self._ready += block_ids[len(self._ready) : num_ready]
        self._wake.set()

    async def run(self) -> HandoffResult:
        """Hands over and returns after the commit.

        A broken stream is continued once and a bad digest is sent again once; then the error is raised: StaleEpoch or
        StaleIncarnation when this hand-off is fenced, otherwise a HandoffError, CapacityError or UnavailableError.
        """
        breaks_left, digests_left = 1, 1
        while not self._ready and self._ending is None:
            await self._wait_for_wake()
        while True:
            try:
                return await self._attempt()
            except DigestMismatch:
                if not digests_left:
                    raise
                digests_left -= 1
            except (PeerUnavailable, HandoffTimeout):
                if self.lifecycle.state is not SendState.OPENING and await self._is_committed():
                    return self._committed()
                if not breaks_left:
                    raise
                breaks_left -= 1
            if self.lifecycle.state is not SendState.OPENING:
                self.lifecycle.move(SendState.OPENING)

    async def close(self, reason: str) -> None:
        """Tells the receiver that nothing more comes. Best effort, bounded, never raises."""
        if not self._transfer_id or self.lifecycle.state in (SendState.COMMITTED, SendState.RELEASED):
            return
        request = self.job.request
        message = kv.CloseRequest(
            transfer_id=self._transfer_id, request_id=request.request_id, epoch=request.epoch, reason=reason
        )
        try:
            await self._stub.Close(message, timeout=_CLOSE_TIMEOUT_S)
        except grpc.RpcError:
            return

    async def _attempt(self) -> HandoffResult:
        await self._context.reach("handoff.before_open")
        reply = await self._open()
        if not 0 <= reply.first_block <= self.num_blocks or reply.credit_bytes < 2:
            raise BadFrame(f"the receiver answered first_block {reply.first_block} and {reply.credit_bytes} bytes of credit")
        if self._measures.blocks == 0:
            self._measures.reused = reply.first_block
        self.lifecycle.move(SendState.STREAMING)
        self._progress()
        stream = PushStream(self._push_call(), reply.credit_bytes, self._context.progress_timeout_s, self._wake)
        try:
            await self._push(stream, reply)
            await self._finish(stream)
        finally:
            await stream.close()
        return self._committed()

    def _committed(self) -> HandoffResult:
        self.lifecycle.move(SendState.COMMITTED)
        self._progress()
        ended_s = self._ending.prefill_ended_s if self._ending else time.monotonic()
        counters, measures = self._context.counters, self._measures
        counters.handoffs_committed += 1
        return HandoffResult(
            blocks=measures.blocks,
            reused_blocks=measures.reused,
            bytes=measures.bytes,
            transfer_s=measures.busy_s,
            exposed_s=time.monotonic() - ended_s,
        )

    async def _open(self) -> kv.OpenReply:
        give_up_s = time.monotonic() + self._context.open_patience_s
        delay_s, longest_s = _OPEN_BACKOFF_S
        request = self._open_request()
        while True:
            try:
                reply: kv.OpenReply = await self._stub.Open(request, timeout=self._context.progress_timeout_s)
                self._transfer_id = reply.transfer_id
                return reply
            except grpc.RpcError as error:
                refusal = stream_error(error)
            if not isinstance(refusal, (CapacityError, PeerUnavailable)) or time.monotonic() + delay_s > give_up_s:
                raise refusal
            await asyncio.sleep(max(delay_s, min(refusal.retry_after_s, longest_s)))
            delay_s = min(2 * delay_s, longest_s)

    def _open_request(self) -> kv.OpenRequest:
        job, layout = self.job, self._context.port.layout
        return kv.OpenRequest(
            request_id=job.request.request_id,
            epoch=job.request.epoch,
            source_instance=job.source_instance,
            source_incarnation=job.source_incarnation,
            target_instance=job.target_instance,
            target_incarnation=job.target_incarnation,
            fingerprint=job.fingerprint,
            num_tokens=job.num_tokens,
            num_blocks=self.num_blocks,
            block_hashes=sequence_hashes(job.fingerprint, job.request),
            layers_per_group=layout.layers_per_group,
            capability=kv.Capability.FromString(job.capability),
            deadline_s=self._context.progress_timeout_s,
        )

    async def _push(self, stream: PushStream, reply: kv.OpenReply) -> None:
        batch = Batch(min(self._context.frame_bytes, reply.credit_bytes // 2))
        self._next_block = reply.first_block
        while self._ending is None or self._next_block < len(self._ready):
            if self._next_block >= len(self._ready):
                await self._beat(stream)
                continue
            started_s = time.monotonic()
            await self._push_block(stream, self._next_block, batch)
            self._measures.spent(started_s, time.monotonic())
            self._next_block += 1

    async def _push_block(self, stream: PushStream, index: int, batch: Batch) -> None:
        """Puts one block into the batch, which goes out when it is full and when no other block is ready."""
        port = self._context.port
        for group in range(port.layout.num_groups):
            await self._context.reach("handoff.mid_push")
            data = port.export_kv(self._ready[index], group)
            digest = self._scope.of(index, group, data)
            for frame in split(index, group, data, digest, batch.limit_bytes):
                if not batch.has_room(frame):
                    await self._flush(stream, batch)
                batch.add(frame)
        batch.completed.append(index)
        if batch.full or index + 1 >= len(self._ready):
            await self._flush(stream, batch)

    async def _flush(self, stream: PushStream, batch: Batch) -> None:
        """Sends what the batch holds; its blocks count as sent with that."""
        if not batch.frames:
            return
        frames, completed = batch.take()
        size = sum(frame.payload.nbytes for frame in frames)
        await stream.send(encode_data(self._transfer_id, self.job.request.epoch, frames), size)
        self._measures.bytes += size
        self._context.counters.kv_bytes_sent += size
        for index in completed:
            self._count_block(index)
        self._progress()

    def _count_block(self, index: int) -> None:
        self._context.counters.kv_blocks_sent += 1
        if index not in self._measures.seen:
            self._measures.seen.add(index)
            self._measures.blocks += 1

    async def _finish(self, stream: PushStream) -> None:
        ending = self._ending
        assert ending is not None
        await self._context.reach("handoff.before_end")
        timeline = common.Timeline()
        timeline.CopyFrom(ending.timeline)
        if self.job.source_epoch is None:
            timeline.handoff_blocks = self._measures.blocks
            timeline.handoff_reused_blocks = self._measures.reused
            timeline.handoff_bytes = self._measures.bytes
            timeline.handoff_s = self._measures.busy_s
            timeline.handoff_hidden_s = self._measures.busy_before_s(ending.prefill_ended_s)
        end = kv.EndFrame(
            num_tokens=self.job.num_tokens if ending.num_tokens is None else ending.num_tokens,
            next_token_ids=pack_tokens(ending.next_token_ids),
            first_output_index=ending.first_output_index,
            timeline=timeline,
            since_prefill_s=time.monotonic() - ending.prefill_ended_s,
            next_logprobs=ending.next_logprobs,
        )
        self.lifecycle.move(SendState.ENDING)
        await stream.send(encode_other(self._transfer_id, self.job.request.epoch, end))
        commit = await stream.commit()
        if commit.epoch != self.job.request.epoch:
            raise StaleEpoch(f"{self.job.request.request_id}: committed at epoch {commit.epoch}")

    async def _beat(self, stream: PushStream) -> None:
        """Waits for news; tells the receiver now and then that this side is alive while its engine is."""
        try:
            async with asyncio.timeout(self._context.progress_timeout_s / 4):
                await self._wait_for_wake()
        except TimeoutError:
            if self._context.engine_alive():
                await stream.send(encode_other(self._transfer_id, self.job.request.epoch))
                self._progress()
        stream.check()

    async def _wait_for_wake(self) -> None:
        await self._wake.wait()
        self._wake.clear()

    async def _is_committed(self) -> bool:
        request = self.job.request
        holder = await self._context.holder_of(request.request_id)
        if holder is not None and holder.epoch == self.job.source_epoch:
            return False  # the move has not been committed
        if holder is None or holder.epoch != request.epoch:
            raise StaleEpoch(f"{request.request_id}: epoch {request.epoch} is over")
        if not holder.instance_id:  # it ended while nobody looked, or it waits for another prefill
            if holder.state == "DONE" and self.lifecycle.state is SendState.ENDING:
                return True  # this side never finishes what it has begun to hand over
            raise StaleEpoch(f"{request.request_id}: epoch {request.epoch} is over, the request is {holder.state}")
        target = (self.job.target_instance, self.job.target_incarnation)
        return (holder.instance_id, holder.incarnation) == target

    def _progress(self) -> None:
        self._context.on_progress(self.job.request.request_id, self.job.request.epoch)


def is_fence(error: AutanError) -> bool:
    """True when the hand-off did not fail but was overtaken: somebody else decides what becomes of the request."""
    return isinstance(error, FenceError)
