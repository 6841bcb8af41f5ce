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
from workers.kv_transfer.attempt import Attempt
from workers.kv_transfer.block_names import sequence_hashes
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.encodings import Encoding, agreed, offered
from workers.kv_transfer.handoff_job import Ending, HandoffJob, HandoffResult, SendContext
from workers.kv_transfer.lifecycle import Lifecycle, SendState, sending
from workers.kv_transfer.measures import Measures
from workers.kv_transfer.pool_mappings import offer_of
from workers.kv_transfer.push_calls import PushCalls, StreamChannels
from workers.kv_transfer.push_stream import stream_error
from workers.kv_transfer.stream_feed import Plan, Supply
from workers.kv_transfer.striping import is_sound, leading_blocks, wanted_streams

_OPEN_BACKOFF_S = (0.05, 0.25)
_CLOSE_TIMEOUT_S = 1.0
PUSH_METHOD = "/autan.v1.KvTransfer/Push"


def _stub(channel: grpc.aio.Channel) -> Any:
    make: Any = kv_pb2_grpc.KvTransferStub
    return make(channel)


class Handoff:
    """One hand-off. `blocks_ready` and `end` feed it, `run` carries it out; the caller gives the blocks back afterwards.

    `run` may be cancelled at any point: nothing is exported after that. `lifecycle` is then not COMMITTED, and the caller
    aborts it. `host` is where the peer may name a port of its own for Push.
    """

    push_method = PUSH_METHOD

    def __init__(self, job: HandoffJob, channels: StreamChannels, context: SendContext, host: str = "") -> None:
        self.job = job
        self.lifecycle: Lifecycle[SendState] = sending()
        self._stub = _stub(channels(0))
        self._channels = channels
        self._host = host
        self._context = context
        self._scope = DigestScope(fingerprint_key(job.fingerprint), job.request.request_id, job.request.epoch)
        self._supply = Supply()
        self._running: Attempt | None = None
        self._transfer_id = ""
        self._measures = Measures()

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole sequence, the partial one included; of a move, the most that it may have."""
        return -(-self.job.num_tokens // self._context.port.layout.block_tokens)

    @property
    def blocks_behind(self) -> int:
        """Blocks that may go and were not sent yet; all of them before the receiver has answered."""
        return len(self._supply.ready) if self._running is None else self._running.blocks_behind

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
        self._supply.ending = ending
        rows = self.job.num_tokens if ending.num_tokens is None else ending.num_tokens
        self._extend(-(-rows // self._context.port.layout.block_tokens), block_ids)

    def _extend(self, num_ready: int, block_ids: tuple[int, ...]) -> None:
        self._supply.ready += block_ids[len(self._supply.ready) : num_ready]
        self._supply.bell.ring()

    async def run(self) -> HandoffResult:
        """Hands over and returns after the commit.

        A broken stream is continued once and a bad digest is sent again once; then the error is raised: StaleEpoch or
        StaleIncarnation when this hand-off is fenced, otherwise a HandoffError, CapacityError or UnavailableError.
        """
        breaks_left, digests_left = 1, 1
        while not self._supply.ready and self._supply.ending is None:
            await self._supply.bell.wait()
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
        plan = await self._open()
        if self._measures.blocks == 0:
            self._measures.reused = leading_blocks(plan.next_blocks)
        self.lifecycle.move(SendState.STREAMING)
        self._progress()
        calls = PushCalls(self.push_method, self._channels, self._context.dial, self._host)
        try:
            await calls.prepare(plan.push_port, plan.streams)
            self._running = Attempt(plan, self._supply, self._scope, self._context, self._measures, calls.open)
            commit = await self._running.run(self._make_end)
        finally:
            calls.close()
        if commit.epoch != self.job.request.epoch:
            raise StaleEpoch(f"{self.job.request.request_id}: committed at epoch {commit.epoch}")
        return self._committed()

    def _plan(self, reply: kv.OpenReply, asked: int) -> Plan:
        """Raises BadFrame for an answer that cannot be right."""
        next_blocks = tuple(reply.next_blocks) or (reply.first_block,)
        in_range = 0 <= reply.first_block <= self.num_blocks and reply.credit_bytes >= 2 and reply.push_port < 1 << 16
        if not in_range or not is_sound(next_blocks, asked, reply.first_block, self.num_blocks):
            raise BadFrame(
                f"the receiver answered first_block {reply.first_block}, next blocks {next_blocks[:16]} of {self.num_blocks} "
                f"on at most {asked} streams, {reply.credit_bytes} bytes of credit, and push port {reply.push_port}"
            )
        self._transfer_id = reply.transfer_id
        return Plan(
            transfer_id=reply.transfer_id,
            request_id=self.job.request.request_id,
            epoch=self.job.request.epoch,
            credit_bytes=reply.credit_bytes,
            next_blocks=next_blocks,
            encoding=agreed(reply.encoding, self._offered()),
            mapped=reply.shared_pool.mapped,
            push_port=reply.push_port,
        )

    def _offered(self) -> tuple[Encoding, ...]:
        return offered(self._context.compression, self._context.port.layout)

    def _committed(self) -> HandoffResult:
        self.lifecycle.move(SendState.COMMITTED)
        self._progress()
        ending = self._supply.ending
        ended_s = ending.prefill_ended_s if ending else time.monotonic()
        counters, measures = self._context.counters, self._measures
        counters.handoffs_committed += 1
        return HandoffResult(
            blocks=measures.blocks,
            reused_blocks=measures.reused,
            bytes=measures.bytes,
            transfer_s=measures.busy_s,
            exposed_s=time.monotonic() - ended_s,
        )

    async def _open(self) -> Plan:
        give_up_s = time.monotonic() + self._context.open_patience_s
        delay_s, longest_s = _OPEN_BACKOFF_S
        request = self._open_request()
        while True:
            try:
                reply: kv.OpenReply = await self._stub.Open(request, timeout=self._context.progress_timeout_s)
                return self._plan(reply, request.streams)
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
            shared_pool=offer_of(self._context.segment()),
            streams=wanted_streams(self.num_blocks * layout.block_bytes, self._context.stream_bytes, self._context.streams),
            offer=kv.KvOffer(encodings=[one.value for one in self._offered()], inexact=not job.is_exact),
        )

    async def _make_end(self) -> kv.EndFrame:
        ending = self._supply.ending
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
        self.lifecycle.move(SendState.ENDING)
        end = kv.EndFrame(
            num_tokens=self.job.num_tokens if ending.num_tokens is None else ending.num_tokens,
            next_token_ids=pack_tokens(ending.next_token_ids),
            first_output_index=ending.first_output_index,
            timeline=timeline,
            since_prefill_s=time.monotonic() - ending.prefill_ended_s,
            next_logprobs=ending.next_logprobs,
        )
        end.digest = self._scope.of_end(end)
        return end

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
