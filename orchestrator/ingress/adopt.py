"""Requests that come to this ingress otherwise than by a fresh submit: resumed, left by another ingress, or asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from weakref import WeakValueDictionary

from google.protobuf.message import DecodeError

from orchestrator.domain.clock import Clock
from orchestrator.ingress.journal import Journal
from orchestrator.ingress.live import LiveStream, StreamTable
from orchestrator.ingress.metrics import Metrics
from orchestrator.ingress.model import ServedModel
from orchestrator.ingress.owner import Ownership
from orchestrator.ingress.records import ended_stream_of, stream_of
from orchestrator.ingress.verdicts import diverged_error
from orchestrator.store.client import Store
from orchestrator.store.replies import TERMINAL, ResumeReply
from protos.contract.errors import AutanError, InternalError, ResumeGone, UnavailableError, UnknownRequest
from protos.contract.redis_names import Code, unpack_tokens
from protos.wire import common

logger = logging.getLogger(__name__)


class Adopter:
    """Brings a request from Redis to life here. Two callers that ask for one id at once get one stream."""

    def __init__(
        self,
        *,
        store: Store,
        owner: Ownership,
        table: StreamTable,
        journal: Journal,
        model: ServedModel,
        clock: Clock,
        metrics: Metrics,
        max_timeout_s: float,
    ) -> None:
        self._store = store
        self._owner = owner
        self._table = table
        self._journal = journal
        self._model = model
        self._clock = clock
        self._metrics = metrics
        self._max_timeout_s = max_timeout_s
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def lock(self, request_id: str) -> asyncio.Lock:
        """Serialises what brings this id into the table."""
        found = self._locks.get(request_id)
        if found is None:
            found = self._locks[request_id] = asyncio.Lock()
        return found

    async def find(self, request_id: str, tenant: str) -> LiveStream:
        """The stream of a request, live or ended, wherever it is.

        Raises UnknownRequest when the tenant has no such request, StoreUnavailable when only Redis could tell.
        """
        async with self.lock(request_id):
            return await self.find_locked(request_id, tenant)

    async def find_locked(self, request_id: str, tenant: str) -> LiveStream:
        """`find` for a caller that holds the lock of the id."""
        live = self._table.get(request_id)
        if live is not None:
            if tenant and live.spec.tenant != tenant:
                raise unknown_error(request_id)
            return live
        reply = await self._resume(request_id, tenant, take=False)
        if reply.state not in TERMINAL:
            reply = await self._resume(request_id, tenant, take=True)
        if reply.state in TERMINAL:
            return self._replayed(reply)
        return self._adopted(reply)

    async def adopt_all(self, request_ids: Iterable[str]) -> int:
        """Adopts those that are live and not here; returns how many. One that cannot be adopted does not stop the others."""
        adopted = 0
        for request_id in request_ids:
            if self._table.get(request_id) is not None:
                continue
            try:
                await self.find(request_id, "")
                adopted += 1
            except UnavailableError:
                raise
            except AutanError as error:
                logger.warning("request %s could not be adopted: %s", request_id, error)
        return adopted

    async def retake(self) -> None:
        """Makes every live stream here a request of the present registration, after a new one was needed."""
        for live in self._table:
            if live.owner_epoch != self._owner.epoch and live.needs_owner:
                reply = await self._resume(live.request_id, "", take=True, missing_ok=True)
                live.owner_epoch = self._owner.epoch
                if reply.code is Code.OK:
                    self._journal.mark(live)

    async def catch_up(self, live: LiveStream) -> bool:
        """Reads the journal of a live stream and has its workers replay to here; True when there were tokens in it to take in.

        Only for a request that is ours: whoever else had it would lose it.
        """
        stream = live.stream
        async with self.lock(live.request_id):
            reply = await self._resume(live.request_id, "", take=True, missing_ok=True)
            if reply.code is not Code.OK or reply.state in TERMINAL or not live.needs_owner:
                return False  # the next look at it tells the end
            before = stream.accepted
            stream.supersede(reply.epoch, reply.n)
            if not stream.backfill(unpack_tokens(reply.tokens)):
                self._table.give_up(live, diverged_error(live.request_id), "diverged")
                return False
        live.acknowledge()
        live.wake()
        self._journal.mark(live)
        self._metrics.count("tokens_read_back", max(0, stream.accepted - before))
        return stream.accepted > before

    async def _resume(self, request_id: str, tenant: str, take: bool, missing_ok: bool = False) -> ResumeReply:
        owner = self._owner
        reply = await self._store.resume(
            request_id,
            tenant,
            ingress_id=owner.ingress_id,
            ingress_epoch=owner.epoch,
            ingress_addr=owner.address,
            take=take,
        )
        if reply.code is Code.GONE and not missing_ok:
            raise unknown_error(request_id)
        if reply.code is Code.STALE:
            raise UnavailableError(f"{owner.ingress_id} is not registered any more; try again", 0.5)
        return reply

    def _spec(self, reply: ResumeReply) -> common.RequestSpec:
        try:
            return common.RequestSpec.FromString(reply.spec)
        except DecodeError as error:
            raise InternalError("a request in Redis has no readable spec; was it written by another version?") from error

    def _adopted(self, reply: ResumeReply) -> LiveStream:
        spec = self._spec(reply)
        stream = stream_of(spec, self._model, reply.tokens, reply.epoch)
        # Redis ends the request at its own deadline; this one only bounds the wait if nobody does.
        deadline_at_s = self._clock.now_s() + self._max_timeout_s
        live = LiveStream(spec, stream, self._clock, deadline_at_s=deadline_at_s, submitted_at_s=None)
        live.owner_epoch = self._owner.epoch
        live.runs_alone = True
        self._table.add(live)
        self._metrics.count("requests_adopted")
        self._journal.mark(live)
        return live

    def _replayed(self, reply: ResumeReply) -> LiveStream:
        spec = self._spec(reply)
        stream = ended_stream_of(spec, self._model, reply)
        return LiveStream(spec, stream, self._clock, deadline_at_s=self._clock.now_s(), submitted_at_s=None)


def unknown_error(request_id: str) -> UnknownRequest:
    """The same words for an id that never was, was forgotten, or is of another tenant."""
    return UnknownRequest(f"request {request_id} is not known here (results are kept for a limited time)")


def check_index(live: LiveStream, from_index: int) -> None:
    """Raises ResumeGone for an index beyond the tokens that are here."""
    if from_index > live.stream.accepted:
        raise ResumeGone(
            f"from_index: {from_index} is beyond the {live.stream.accepted} tokens of request {live.request_id}; resume lower"
        )
