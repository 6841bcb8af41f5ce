"""The client API: Generate, Cancel, Resume, Tokenize, ListModels.

Events go out through the context, each write with a deadline. A stream keeps no copy of its tokens for a client: it reads
the accepted ones by cursor, so a client that reads slowly costs nothing but its place, and one that does not read at all
loses its stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import grpc.aio

from orchestrator.ingress.adopt import Adopter, check_index, unknown_error
from orchestrator.ingress.auth import Principal
from orchestrator.ingress.departures import Departures
from orchestrator.ingress.fanout import MAX_CHOICES, ChoiceReader, choice_id, fan_out
from orchestrator.ingress.intake import Intake
from orchestrator.ingress.live import LiveStream, StreamTable
from orchestrator.ingress.metrics import Metrics
from orchestrator.ingress.model import ServedModel
from orchestrator.ingress.validate import check_request_id
from orchestrator.store.client import Store
from protos.contract.errors import Cancelled, CapacityError, InvalidRequest, UnknownRequest
from protos.contract.redis_names import Code
from protos.rpc import inference_pb2_grpc
from protos.wire import inference

_RETRY_AFTER_S = 1.0
Authorise = Callable[[str, dict[str, str]], Principal]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """See protos/autan/v1/inference.proto for the promises."""

    def __init__(
        self,
        *,
        authorise: Authorise,
        intake: Intake,
        adopter: Adopter,
        departures: Departures,
        table: StreamTable,
        store: Store,
        model: ServedModel,
        metrics: Metrics,
        max_streams: int,
        max_event_tokens: int,
        stall_s: float,
    ) -> None:
        self._authorise = authorise
        self._intake = intake
        self._adopter = adopter
        self._departures = departures
        self._table = table
        self._store = store
        self._model = model
        self._metrics = metrics
        self._max_streams = max_streams
        self._max_event_tokens = max_event_tokens
        self._stall_s = stall_s
        self.open_streams = 0

    async def Generate(self, request: inference.GenerateRequest, context: Any) -> None:
        """Submits and streams. A client that leaves cancels a request that nobody else listens to (see departures)."""
        principal = self._caller("Generate", context)
        with self._stream_slot():
            # Shielded: a client that leaves in the middle of a submit has left a request behind.
            accepting = asyncio.ensure_future(self._accept_all(request, principal, context.time_remaining()))
            try:
                lives = await asyncio.shield(accepting)
            except asyncio.CancelledError:
                accepting.add_done_callback(self._left_while_accepting)
                raise
            try:
                await self._stream(lives, 0, context)
            finally:
                for live in lives:
                    self._departures.left(live)

    async def Resume(self, request: inference.ResumeRequest, context: Any) -> None:
        """Streams an accepted request from an index on; the request does not depend on this client."""
        principal = self._caller("Resume", context)
        check_request_id(request.request_id)
        with self._stream_slot():
            live = await self._adopter.find(request.request_id, principal.tenant)
            check_index(live, request.from_index)
            live.runs_alone = True
            await self._stream([live], request.from_index, context)

    async def Cancel(self, request: inference.CancelRequest, context: Any) -> inference.CancelReply:
        """Idempotent; reaches the request in every stage."""
        principal = self._caller("Cancel", context)
        check_request_id(request.request_id)
        state = await self._cancel(request.request_id, principal.tenant)
        return inference.CancelReply(state=state)

    async def Tokenize(self, request: inference.TokenizeRequest, context: Any) -> inference.TokenizeReply:
        """The ids that Generate would see."""
        self._caller("Tokenize", context)
        ids = await self._intake.tokenize(request)
        return inference.TokenizeReply(ids=ids, model=self._model.name)

    async def ListModels(self, request: inference.ListModelsRequest, context: Any) -> inference.ListModelsReply:
        """The one model that is served."""
        self._caller("ListModels", context)
        card = self._model.card
        model = inference.Model(
            name=self._model.name,
            architecture=card.architecture,
            context_tokens=card.context_tokens,
            vocab_size=card.vocab_size,
            has_chat_template=self._model.chat is not None,
        )
        return inference.ListModelsReply(models=[model])

    def _caller(self, method: str, context: Any) -> Principal:
        metadata = {str(key): value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self._authorise(f"/autan.v1.Inference/{method}", metadata)

    @contextmanager
    def _stream_slot(self) -> Iterator[None]:
        if self.open_streams >= self._max_streams:
            raise CapacityError(f"{self._max_streams} streams are open, which is the limit; come back later", _RETRY_AFTER_S)
        self.open_streams += 1
        try:
            yield
        finally:
            self.open_streams -= 1

    def _left_while_accepting(self, accepting: asyncio.Future[list[LiveStream]]) -> None:
        if not accepting.cancelled() and accepting.exception() is None:
            for live in accepting.result():
                self._departures.left(live)

    async def _accept_all(
        self, request: inference.GenerateRequest, principal: Principal, time_left_s: float | None
    ) -> list[LiveStream]:
        """The streams of all choices. One that is not accepted takes the others with it."""
        wanted = [self._intake.accept(one, principal, time_left_s) for one in fan_out(request)]
        outcomes = await asyncio.gather(*wanted, return_exceptions=True)
        lives = [outcome for outcome in outcomes if isinstance(outcome, LiveStream)]
        refusals = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if refusals:
            for live in lives:
                self._departures.left(live)
            raise refusals[0]
        return lives

    async def _cancel(self, request_id: str, tenant: str) -> str:
        """Cancels a request, or all choices of one; the state of the first that was found. Raises UnknownRequest."""
        reason = "client asked for it"
        try:
            return await cancel_request(self._store, self._table, request_id, tenant, reason)
        except UnknownRequest as error:
            states = []
            for choice in range(MAX_CHOICES):
                with suppress(UnknownRequest, InvalidRequest):
                    one = choice_id(request_id, choice)
                    check_request_id(one)
                    states.append(await cancel_request(self._store, self._table, one, tenant, reason))
                if len(states) <= choice:
                    break
            if not states:
                raise error from None
            return states[0]

    async def _stream(self, lives: Sequence[LiveStream], cursor: int, context: Any) -> None:
        """Of each choice: accepted, tokens from `cursor` on, and how it ended; an error of the tree when one has no result."""
        news = asyncio.Event()
        for live in lives:
            self._table.attach(live, news)
        reader = ChoiceReader(lives, cursor, self._max_event_tokens)
        try:
            for event in reader.accepted():
                await self._write(context, event)
            while not reader.is_over:
                news.clear()
                events = reader.news()
                for event in events:
                    await self._write(context, event)
                if not events:
                    await news.wait()
        except grpc.aio.BaseError:
            self._metrics.count("writes_to_nobody")  # the client is gone; what follows is the business of departures
        finally:
            for live in lives:
                self._table.detach(live, news)

    async def _write(self, context: Any, event: inference.GenerateEvent) -> None:
        writing: Awaitable[None] = context.write(event)
        try:
            async with asyncio.timeout(self._stall_s):
                await writing
        except TimeoutError:
            self._metrics.count("streams_stalled")
            raise Cancelled(f"the client did not read for {self._stall_s:g} s: its stream is closed") from None


async def cancel_request(store: Store, table: StreamTable, request_id: str, tenant: str, reason: str) -> str:
    """Cancels in Redis, then here. `tenant` "" means any. Returns the state after the call; raises UnknownRequest."""
    reply = await store.cancel(request_id, tenant, reason)
    if reply.code is Code.GONE:
        raise unknown_error(request_id)
    live = table.get(request_id)
    if live is not None and reply.code is Code.OK:
        table.end(live, Cancelled(f"request {request_id} was cancelled ({reason})"))
    return reply.state
