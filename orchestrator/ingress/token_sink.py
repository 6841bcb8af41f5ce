"""Where workers bring tokens. Served on a listener of its own, which clients never reach."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from orchestrator.ingress.acks import AckBox
from orchestrator.ingress.journal import Journal
from orchestrator.ingress.live import LiveStream, StreamTable
from orchestrator.ingress.metrics import Metrics
from orchestrator.ingress.records import merge_timeline
from orchestrator.ingress.streams import Delivery, FinishReason, Receipt, Verdict
from orchestrator.ingress.tasks import end_tasks
from orchestrator.ingress.verdicts import diverged_error
from orchestrator.ingress.watch import Watch
from protos.contract.errors import AutanError, EngineFailure, InvalidRequest
from protos.contract.redis_names import is_name, unpack_tokens
from protos.contract.token_logprobs import is_packed
from protos.rpc import tokens_pb2_grpc
from protos.wire import common, tokens

logger = logging.getLogger(__name__)

MAX_REQUESTS_PER_BATCH = 1024
MAX_TOKENS_PER_REQUEST = 1_048_576

_FINISH = {
    common.FINISH_REASON_STOP: FinishReason.STOP,
    common.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


class TokenSink(tokens_pb2_grpc.TokenSinkServicer):
    """One bidirectional stream for each worker: tokens in, acknowledgements out."""

    def __init__(self, *, table: StreamTable, journal: Journal, watch: Watch, metrics: Metrics) -> None:
        self._table = table
        self._journal = journal
        self._watch = watch
        self._metrics = metrics

    async def Deliver(
        self, request_iterator: AsyncIterator[tokens.TokenBatch], context: Any
    ) -> AsyncIterator[tokens.TokenAcks]:
        """Takes tokens for as long as the worker is connected. A malformed batch ends the connection."""
        box = AckBox()
        reader = asyncio.create_task(self._read(request_iterator, box))
        try:
            while (acks := await box.take()) is not None:
                yield acks
            await reader
        finally:
            box.close()
            await end_tasks([reader])
            if not reader.cancelled():
                reader.exception()  # seen by the await above, or the worker is gone and nobody wants it

    async def _read(self, batches: AsyncIterator[tokens.TokenBatch], box: AckBox) -> None:
        try:
            async for batch in batches:
                await self._journal.room()
                self.take(batch, box)
        finally:
            box.close()

    def take(self, batch: tokens.TokenBatch, box: AckBox) -> None:
        """One batch of one worker. Raises InvalidRequest, before anything is taken, when it is malformed."""
        if len(batch.requests) > MAX_REQUESTS_PER_BATCH:
            raise InvalidRequest(f"requests: {len(batch.requests)} in one batch, more than {MAX_REQUESTS_PER_BATCH}")
        if not is_name(batch.instance_id):
            raise InvalidRequest("instance_id: it is not 1 to 64 characters of A-Z a-z 0-9 _ . -")
        deliveries = [(message, _delivery(message)) for message in batch.requests]
        self._metrics.count("token_batches")
        for message, delivery in deliveries:
            self._take_one(batch.instance_id, message, delivery, box)

    def _take_one(self, instance_id: str, message: tokens.RequestTokens, delivery: Delivery, box: AckBox) -> None:
        live = self._table.get(message.request_id)
        if live is None:
            if self._table.has_ended(message.request_id):
                box.put(message.request_id, delivery.epoch, delivery.first_index + len(delivery.token_ids), finished=True)
            else:
                self._watch.wanted(message.request_id, delivery.epoch, box)
            return
        receipt = live.receive(instance_id, box, delivery, self._metrics)
        if message.HasField("timeline") and receipt.verdict in (Verdict.TAKEN, Verdict.KNOWN):
            merge_timeline(live.timeline, message.timeline)
        self._follow_up(live, receipt)

    def _follow_up(self, live: LiveStream, receipt: Receipt) -> None:
        known = live.stream.accepted
        match receipt.verdict:
            case Verdict.DIVERGED:
                self._give_up(live, diverged_error(live.request_id))
            case Verdict.INVALID:
                self._give_up(live, EngineFailure(f"request {live.request_id}: the worker sent a token outside the vocabulary"))
            case Verdict.GAP:
                if live.request_id not in self._table.gaps:
                    logger.warning("request %s: its worker has tokens beyond the %d that are here", live.request_id, known)
                self._table.lacks_tokens(live)
                self._watch.wake()
            case Verdict.TAKEN | Verdict.KNOWN:
                self._table.follows_on(live)
                self._journal.mark(live)
            case _:
                pass

    def _give_up(self, live: LiveStream, error: AutanError) -> None:
        logger.error("%s", error)
        self._table.give_up(live, error, error.reason.lower())
        self._watch.wake()


def _delivery(message: tokens.RequestTokens) -> Delivery:
    if not is_name(message.request_id):
        raise InvalidRequest("request_id: it is not 1 to 64 characters of A-Z a-z 0-9 _ . -")
    if len(message.token_ids) > 4 * MAX_TOKENS_PER_REQUEST or len(message.token_ids) % 4:
        raise InvalidRequest(f"token_ids: {len(message.token_ids)} bytes of request {message.request_id} are no list of ids")
    if message.logprobs and len(message.logprobs) != len(message.token_ids) // 4:
        raise InvalidRequest(f"logprobs: {len(message.logprobs)} of other tokens than those of request {message.request_id}")
    if any(packed and not is_packed(packed) for packed in message.logprobs):
        raise InvalidRequest(f"logprobs: an entry of request {message.request_id} is none")
    return Delivery(
        epoch=message.epoch,
        first_index=message.first_index,
        token_ids=unpack_tokens(message.token_ids),
        finish=_FINISH.get(message.finish),
        logprobs=message.logprobs,
    )
