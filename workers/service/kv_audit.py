"""Looks at the books of this worker, checks them, and gives back what nobody owns. The rules are in kv_books."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from protos.contract.errors import StaleEpoch
from protos.wire import audit
from workers.engine_api.protocol import Engine
from workers.engine_api.types import BlockOwner, DiskAudit, EngineStats
from workers.kv_tiers.folders import sweep
from workers.kv_transfer.ledger import Entry, Ledger, Side
from workers.kv_transfer.receiver import Receiver
from workers.service import kv_books
from workers.service.assignments import Assignments
from workers.service.engine_thread import EngineThread
from workers.service.handoff_tasks import HandoffTasks
from workers.service.kv_books import RequestKey, Snapshot
from workers.service.membership import Membership
from workers.service.prefix_exchange import PrefixExchange
from workers.service.store import WorkerStore

logger = logging.getLogger(__name__)

_DISK_BLOCKS = 64
_DISK_BYTES = 64 * 1024 * 1024
_DISK_TIMEOUT_S = 3.0  # below what the ingress waits for the answer


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditContext:
    """Whose books there are."""

    me: Membership
    engine: EngineThread
    store: WorkerStore
    assignments: Assignments
    ledger: Ledger
    handoffs: HandoffTasks
    receiver: Receiver
    prefixes: PrefixExchange
    cache_base: Path | None  # of the cluster's disk caches on this node


@dataclass(frozen=True, slots=True)
class _EngineLook:
    owners: tuple[BlockOwner, ...]
    stats: EngineStats
    integrity: str


class KvAudit:
    """Everything runs on the event loop but the look into the engine, which runs between two of its steps."""

    def __init__(self, context: AuditContext) -> None:
        self._context = context

    async def list(self) -> audit.KvBooks:
        """Who owns which blocks. Raises EngineFailure when the engine is gone."""
        snapshot, _ = await self._look(check=False)
        return self._books(snapshot)

    async def verify(self) -> audit.KvAudit:
        """The books against the engine, the engine against itself, and some blocks of the disk against their digests.

        Raises EngineFailure when the engine is gone."""
        started_s = time.monotonic()
        snapshot, integrity = await self._look(check=True)
        on_disk = await self._look_at_disk()
        found = [*kv_books.findings(snapshot, integrity), *kv_books.disk_findings(on_disk)]
        for one in found:
            logger.warning("kv verify: %s %s %d: %s", one.kind, one.request_id, one.epoch, one.detail)
        return audit.KvAudit(
            books=self._books(snapshot),
            findings=found,
            took_s=time.monotonic() - started_s,
            disk_checked=on_disk.checked,
        )

    async def collect(self, apply: bool, cache_owners: Collection[str] = ()) -> audit.KvCollection:
        """Gives back what is provably ownerless, or says what it would give back. With `cache_owners` that goes for disk caches
        of this cluster on this node as well: those of other instances, as far as no process has them locked.

        Raises StoreUnavailable, and gives nothing back, when Redis cannot prove it; EngineFailure when the engine is gone.
        """
        context = self._context
        snapshot, _ = await self._look(check=False)
        returns: list[audit.KvReturn] = []
        for entry in kv_books.overdue(snapshot):
            returns.append(await self._transfer(entry, apply))
        for owner in kv_books.orphans(snapshot):
            returns.append(await self._orphan(owner, apply))
        leaked = snapshot.stats.leaked_blocks
        if leaked:
            blocks = await context.engine.call(lambda engine: engine.reclaim_leaked()) if apply else leaked
            returns.append(
                audit.KvReturn(kind="leaked", blocks=blocks, why="no sequence and no pin refers to them", done=apply)
            )
        if cache_owners and context.cache_base is not None:
            returns += await _swept(context.cache_base, {*cache_owners, context.me.instance_id}, apply)
        for one in returns:
            if one.done:
                logger.warning(
                    "kv gc gave back %d blocks: %s %s %d: %s", one.blocks, one.kind, one.request_id, one.epoch, one.why
                )
        return audit.KvCollection(
            instance_id=context.me.instance_id, incarnation=context.me.number, applied=apply, returns=returns
        )

    async def _look_at_disk(self) -> DiskAudit:
        """Reads a bounded random sample, on a thread of the tiers."""
        engine = self._context.engine
        most = max(1, min(_DISK_BLOCKS, _DISK_BYTES // engine.layout.block_bytes))
        try:
            async with asyncio.timeout(_DISK_TIMEOUT_S):
                return await engine.audit_disk(most, secrets.randbits(32))
        except TimeoutError:
            return DiskAudit(error=f"it did not answer in {_DISK_TIMEOUT_S:g} s")

    async def _transfer(self, entry: Entry, apply: bool) -> audit.KvReturn:
        context, key = self._context, (entry.key.request_id, entry.key.epoch)
        found = audit.KvReturn(kind="overdue", request_id=key[0], epoch=key[1], blocks=entry.blocks)
        why = await self._proof(key)
        if why is None:
            found.kept_because = "Redis has the request alive at this epoch"
            return found
        found.why = f"its lease is over and {why}"
        if not apply:
            return found
        if entry.key.side is Side.RECEIVE:
            context.receiver.abort_request(*key, StaleEpoch(f"{key[0]}: given back, {why}"))
            found.done = True
        elif entry.key.side is Side.BORROW:
            context.prefixes.receiver.abort_request(*key, StaleEpoch(f"{key[0]}: given back, {why}"))
            found.done = True
        elif entry.key.side is Side.LEND:
            found.done = context.prefixes.lendings.cancel_key(*key)
        elif context.handoffs.cancel_key(*key):
            found.done = True
        else:
            await context.engine.let_go(*key)
            if context.ledger.is_open(entry.key):
                context.ledger.release(entry.key)
            found.done = True
        return found

    async def _orphan(self, owner: BlockOwner, apply: bool) -> audit.KvReturn:
        key = (owner.request_id, owner.epoch)
        found = audit.KvReturn(kind="orphan", request_id=key[0], epoch=key[1], blocks=owner.blocks)
        why = await self._proof(key)
        if why is None:
            found.kept_because = "Redis has the request alive at this epoch"
            return found
        found.why = f"no assignment has it and {why}"
        if apply and key not in self._known():
            await self._context.engine.let_go(*key)
            found.done = True
        return found

    async def _proof(self, key: RequestKey) -> str | None:
        if not kv_books.askable(key[0]):
            return "its id was never submitted"
        return kv_books.proof(key, await self._context.store.holder_of(key[0]))

    async def _look(self, check: bool) -> tuple[Snapshot, str]:
        context = self._context
        known, open_before = self._known(), self._open()

        def look(engine: Engine) -> _EngineLook:
            integrity = ""
            if check:
                try:
                    engine.check_integrity()
                except AssertionError as error:
                    integrity = str(error) or "the engine's books do not agree"
            return _EngineLook(engine.block_owners(), engine.stats(), integrity)

        seen = await context.engine.call(look)
        snapshot = Snapshot(
            instance_id=context.me.instance_id,
            incarnation=context.me.number,
            stats=seen.stats,
            owners=seen.owners,
            entries=context.ledger.entries(),
            steady=open_before & self._open(),
            known=known | self._known(),
            opened=context.ledger.opened,
            released=context.ledger.released,
            now_s=time.monotonic(),
            since_s={(a.request_id, a.epoch): a.started_s for a in context.assignments.all()},
        )
        return snapshot, seen.integrity

    def _known(self) -> frozenset[RequestKey]:
        context = self._context
        assigned = ((a.request_id, a.epoch) for a in context.assignments.all())
        entries = ((e.key.request_id, e.key.epoch) for e in context.ledger.entries())
        return frozenset((*assigned, *entries, *context.handoffs.keys()))

    def _open(self) -> frozenset[tuple[RequestKey, Side]]:
        entries = self._context.ledger.entries()
        return frozenset(((e.key.request_id, e.key.epoch), e.key.side) for e in entries)

    def _books(self, snapshot: Snapshot) -> audit.KvBooks:
        made = kv_books.books(snapshot)
        made.pid = os.getpid()
        return made


async def _swept(base: Path, owners: Collection[str], apply: bool) -> list[audit.KvReturn]:
    return [
        audit.KvReturn(
            kind="disk",
            path=str(folder.path),
            bytes=folder.size_bytes,
            why=f"no instance {folder.path.name} is alive",
            done=folder.removed,
            kept_because=folder.kept_because,
        )
        for folder in await asyncio.to_thread(sweep, base, owners, apply)
    ]
