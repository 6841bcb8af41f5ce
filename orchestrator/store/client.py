"""The store as the orchestrator sees it: one typed method for each function that the ingress, the core and operators call.

Every method sends one call per batch and never repeats it by itself: after StoreUnavailable it is unknown whether the call
took effect, and repeating the same call is always safe (the functions are idempotent). Errors: StoreUnavailable,
StoreFull (only submit), ConfigError (credentials), InternalError (arguments that the library refuses).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Self

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from orchestrator.store import decode, replies
from orchestrator.store.connection import guarded, is_function_missing, open_redis
from orchestrator.store.decode import Cursor, chunks
from orchestrator.store.hints import subscribe
from orchestrator.store.library import load_library
from protos.cancellation import cancellable
from protos.contract.redis_names import Code, Fn, base_key

# Bounds of one call in the library; larger batches are sent as several calls.
EMIT_BATCH = 256
LOOK_BATCH = 256
ASSIGN_BATCH = 64
LIST_LIMIT = 1000
NOTE_BYTES = 256

DEFAULT_RETAIN_S = 600.0

Argument = str | bytes | int


class Store:
    """A connection to one cluster's store. Make it with `connect`; use it from one event loop; `close` it."""

    def __init__(self, url: str, cluster: str, timeout_s: float = 1.0, retain_s: float = DEFAULT_RETAIN_S) -> None:
        self.url = url
        self.cluster = cluster
        self.timeout_s = timeout_s
        self._base = base_key(cluster)
        self._retain_ms = max(1, int(retain_s * 1000))
        self._redis: Redis = open_redis(url, timeout_s)

    @classmethod
    async def connect(cls, url: str, cluster: str, timeout_s: float = 1.0, retain_s: float = DEFAULT_RETAIN_S) -> Self:
        """Opens the store and loads the library where it is missing or of another version.

        `retain_s`: how long a request can be read after it ended by finish or cancel.
        Raises StoreUnavailable when it does not answer, ValueError for a cluster name outside the charset.
        """
        store = cls(url, cluster, timeout_s, retain_s)
        try:
            await store.load()
        except BaseException:
            await store.close()
            raise
        return store

    async def load(self) -> bool:
        """Loads the library unless the server has exactly this one; True when it had to."""
        with guarded("load the function library"):
            return await cancellable(load_library(self._redis))

    async def ping(self) -> None:
        """Returns when the store answers. Raises StoreUnavailable."""
        with guarded("ping"):
            await cancellable(self._redis.ping())

    async def close(self) -> None:
        """Closes the connections. Idempotent."""
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def hints(self, channel: str) -> AsyncIterator[bytes]:
        """The payloads published on a channel of protos.contract.redis_names, for as long as it is iterated.

        Lossy by contract. An empty payload comes after every connection, the first one included: re-poll, anything may
        have been missed. Loss of the store is waited out, never raised.
        """
        return subscribe(self.url, channel, self.timeout_s)

    # ingress

    async def ingress(self, ingress_id: str, addr: str, ttl_ms: int, epoch: int = 0) -> replies.IngressReply:
        """Registers (`epoch` 0) or renews. STALE: another process registered under this id since."""
        cursor = await self._call(Fn.INGRESS, ingress_id, addr, ttl_ms, epoch)
        code = cursor.code()
        return replies.IngressReply(code, cursor.number(), cursor.number()) if code is Code.OK else replies.IngressReply(code)

    async def submit(
        self,
        *,
        request_id: str,
        body_hash: bytes,
        spec: bytes,
        tenant: str,
        model: str,
        prompt_tokens: int,
        max_tokens: int,
        prio: int,
        timeout_ms: int,
        ingress_id: str,
        ingress_epoch: int,
        ingress_addr: str,
        queue_limit: int,
    ) -> replies.SubmitReply:
        """Accepts a request, once for one id. Raises StoreFull when Redis is at its memory limit."""
        cursor = await self._call(
            Fn.SUBMIT, request_id, body_hash, spec, tenant, model, prompt_tokens, max_tokens, prio, timeout_ms,
            ingress_id, ingress_epoch, ingress_addr, queue_limit,
        )  # fmt: skip
        code = cursor.code()
        if code is Code.FULL:
            return replies.SubmitReply(code, queued=cursor.number())
        if code is Code.CONFLICT:
            return replies.SubmitReply(code)
        return replies.SubmitReply(code, cursor.text(), cursor.number(), cursor.number(), cursor.number())

    async def cancel(self, request_id: str, tenant: str, reason: str) -> replies.CancelReply:
        """Ends a live request of the tenant ("" = of any)."""
        cursor = await self._call(Fn.CANCEL, request_id, tenant, reason, self._retain_ms)
        code = cursor.code()
        return replies.CancelReply(code, "" if code is Code.GONE else cursor.text())

    async def resume(
        self,
        request_id: str,
        tenant: str,
        *,
        ingress_id: str,
        ingress_epoch: int,
        ingress_addr: str,
        from_index: int = 0,
        take: bool = False,
    ) -> replies.ResumeReply:
        """Reads a request from a token on; `take` makes the calling ingress its owner while it is live."""
        cursor = await self._call(Fn.RESUME, request_id, tenant, ingress_id, ingress_epoch, ingress_addr, from_index, int(take))
        code = cursor.code()
        if code is Code.GAP:
            return replies.ResumeReply(code, n=cursor.number())
        if code is not Code.OK:
            return replies.ResumeReply(code)
        return replies.ResumeReply(
            code, cursor.text(), cursor.number(), cursor.number(), cursor.blob(), cursor.text(), cursor.blob(), cursor.blob()
        )

    async def emit(self, ingress_id: str, ingress_epoch: int, items: Sequence[replies.Emission]) -> list[replies.EmitOutcome]:
        """Journals tokens; one outcome for each item, in order. More than 256 items are several calls."""
        outcomes: list[replies.EmitOutcome] = []
        for part in chunks(items, EMIT_BATCH):
            arguments: list[Argument] = [ingress_id, ingress_epoch, len(part)]
            for item in part:
                arguments += (item.request_id, item.epoch, item.first_index, item.tokens)
            cursor = await self._call(Fn.EMIT, *arguments)
            cursor.code()
            outcomes += [replies.EmitOutcome(cursor.code(), cursor.number()) for _ in part]
        return outcomes

    async def finish(
        self, *, ingress_id: str, ingress_epoch: int, request_id: str, epoch: int, reason: str, n: int
    ) -> replies.FinishReply:
        """Ends a request with `n` journaled tokens as DONE; `reason` is stop, length or cancelled."""
        cursor = await self._call(Fn.FINISH, ingress_id, ingress_epoch, request_id, epoch, reason, n, self._retain_ms)
        code = cursor.code()
        if code is Code.GONE:
            return replies.FinishReply(code)
        return replies.FinishReply(code, cursor.text(), cursor.number() if code is Code.GAP else n)

    async def look(self, request_ids: Sequence[str]) -> list[replies.Look]:
        """The state of each request, in order."""
        found: list[replies.Look] = []
        for part in chunks(request_ids, LOOK_BATCH):
            cursor = await self._call(Fn.LOOK, len(part), *part)
            cursor.code()
            found += [decode.look(cursor) for _ in part]
        return found

    async def orphans(self, ingress_id: str, limit: int = 256) -> list[str]:
        """Live requests without a registered owner; the caller may `resume` them with `take`."""
        cursor = await self._call(Fn.ORPHANS, ingress_id, min(limit, LIST_LIMIT))
        cursor.code()
        return [decode.as_text(value) for value in cursor.rest()]

    # core

    async def lead(self, candidate_id: str, ttl_ms: int, epoch: int = 0) -> replies.LeadReply:
        """Takes or keeps the leader lease; `epoch` is the one led under, 0 when not leading."""
        cursor = await self._call(Fn.LEAD, candidate_id, ttl_ms, epoch)
        cursor.code()
        return replies.LeadReply(cursor.number(), cursor.number() == 1, cursor.number())

    async def view(self, queue_limit: int = 256) -> replies.View:
        """The head of the queue and all instances."""
        cursor = await self._call(Fn.VIEW, min(queue_limit, LIST_LIMIT))
        cursor.code()
        return replies.View(
            cursor.number(), cursor.number(), cursor.many(decode.queued_record), cursor.many(decode.instance_record)
        )

    async def prompts(self, request_ids: Sequence[str]) -> list[tuple[bytes, bytes]]:
        """Spec and journal of each request, in order; two empty values for one that is not QUEUED, or that was too much."""
        found: list[tuple[bytes, bytes]] = []
        for part in chunks(request_ids, LOOK_BATCH):
            cursor = await self._call(Fn.PROMPTS, len(part), *part)
            cursor.code()
            found += [(cursor.blob(), cursor.blob()) for _ in part]
        return found

    async def assign(
        self, leader_id: str, leader_epoch: int, lease_ms: int, placements: Sequence[replies.Placement]
    ) -> list[replies.AssignOutcome]:
        """Places requests; one outcome each, in order. More than 64 are several calls. Raises NotLeader."""
        outcomes: list[replies.AssignOutcome] = []
        for part in chunks(placements, ASSIGN_BATCH):
            arguments: list[Argument] = [leader_id, leader_epoch, lease_ms, len(part)]
            for at in part:
                arguments += (at.request_id, at.expected_epoch, at.p_inst, at.p_inc, at.d_inst, at.d_inc)
                arguments += (at.p_blocks, at.d_blocks, at.capability)
                arguments += (at.s_inst, at.s_inc, at.s_blocks, at.s_wait_ms, at.s_capability)
            cursor = await self._call(Fn.ASSIGN, *arguments)
            cursor.leading_code()
            outcomes += [replies.AssignOutcome(cursor.code(), cursor.number()) for _ in part]
        return outcomes

    async def reap(
        self, leader_id: str, leader_epoch: int, *, limit: int, max_attempts: int, lost_ms: int, retain_ms: int
    ) -> replies.ReapReply:
        """Ends what ran out of time, at most `limit` requests in this call. Raises NotLeader."""
        cursor = await self._call(Fn.REAP, leader_id, leader_epoch, min(limit, LIST_LIMIT), max_attempts, lost_ms, retain_ms)
        cursor.leading_code()
        return replies.ReapReply(cursor.number(), cursor.many(decode.reaped), cursor.many(Cursor.text))

    async def migrate(
        self, migrations: Sequence[replies.Migration], *, max_migrations: int, leader_id: str = "", leader_epoch: int = 0
    ) -> list[replies.AssignOutcome]:
        """Begins moves of decoding requests; one outcome each, with the epoch of the move: OK, DUPLICATE, STALE, STATE, FULL
        (`max_migrations` were begun) or GONE. Without a leader it is an operator's wish. Raises NotLeader.
        """
        outcomes: list[replies.AssignOutcome] = []
        for part in chunks(migrations, ASSIGN_BATCH):
            arguments: list[Argument] = [leader_id, leader_epoch, max_migrations, len(part)]
            for at in part:
                arguments += (at.request_id, at.expected_epoch, at.target, at.target_inc, at.blocks)
                arguments += (at.move_epoch, at.capability, at.why, at.note.encode()[:NOTE_BYTES])
            cursor = await self._call(Fn.MIGRATE, *arguments)
            cursor.leading_code()
            outcomes += [replies.AssignOutcome(cursor.code(), cursor.number()) for _ in part]
        return outcomes

    # core, operators

    async def drain(self, instance_id: str, on: bool) -> Code:
        """Asks an instance to take no new work, or to take it again. OK or GONE."""
        return (await self._call(Fn.DRAIN, instance_id, int(on))).code()

    async def stats(self) -> replies.StoreStats:
        """Totals and gauges."""
        cursor = await self._call(Fn.STATS)
        cursor.code()
        return decode.store_stats(cursor)

    async def requests(self, limit: int = 100) -> replies.RequestList:
        """Live requests, oldest first, at most `limit`, read page by page: what comes or ends meanwhile may be in it or not."""
        return await self._pages("all", "", limit)

    async def requests_at(self, instance_id: str, limit: int = 1_000_000) -> replies.RequestList:
        """Live requests that the instance takes part in, by id, at most `limit`."""
        return await self._pages("at", instance_id, limit)

    async def request(self, request_id: str) -> replies.LiveRequest | None:
        """One live request; none when there is no such one."""
        found = await self._pages("id", request_id, 1)
        return found.requests[0] if found.requests else None

    async def _pages(self, which: str, name: str, limit: int) -> replies.RequestList:
        found: list[replies.LiveRequest] = []
        now_ms, after_ms, after_id = 0, 0, ""
        while True:
            size = max(0, min(limit - len(found), LIST_LIMIT))
            cursor = await self._call(Fn.REQUESTS, size, which, name, after_ms, after_id)
            cursor.code()
            now_ms, page = cursor.number(), cursor.many(decode.live_request)
            found += page
            if len(page) < LIST_LIMIT or len(found) >= limit or which == "id":
                return replies.RequestList(now_ms, tuple(found))
            after_ms, after_id = page[-1].submitted_ms, page[-1].request_id

    async def moves(self, limit: int = 32) -> replies.MoveLog:
        """What became of the last moves, newest first, at most 256."""
        cursor = await self._call(Fn.MOVES, min(limit, 256))
        cursor.code()
        return replies.MoveLog(cursor.number(), cursor.many(decode.move_record))

    async def _call(self, function: Fn, *arguments: Argument) -> Cursor:
        with guarded(function):
            try:
                reply = await cancellable(self._redis.fcall(function, 1, self._base, *arguments))
            except ResponseError as error:
                if not is_function_missing(error):
                    raise
                # Not found means not run: the one case in which a call is sent again.
                await cancellable(load_library(self._redis))
                reply = await cancellable(self._redis.fcall(function, 1, self._base, *arguments))
        return Cursor(function, reply)
