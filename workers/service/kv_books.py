"""The books of one worker, compared with each other: who owns blocks in the engine, in the ledger and by assignment. Pure.

A snapshot of the engine is taken between two looks at the event loop's books. What the loop knew of in either look is
accounted for; an owner in the engine that neither knows of is an orphan, however busy the worker is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from protos.contract.redis_names import is_name
from protos.wire import audit
from workers.engine_api.types import BlockOwner, DiskAudit, EngineStats
from workers.kv_transfer.handoff_job import Holder
from workers.kv_transfer.ledger import Entry, Side

RequestKey = tuple[str, int]

LIVE_STATES = frozenset({"QUEUED", "ASSIGNED", "PREFILLING", "DECODING"})
_WRITTEN_HERE = frozenset({"prefilling", "decoding"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The books of one worker at one moment, `now_s` on its monotonic clock."""

    instance_id: str
    incarnation: int
    stats: EngineStats
    owners: Sequence[BlockOwner]
    entries: Sequence[Entry]  # of the second look
    steady: frozenset[tuple[RequestKey, Side]]  # entries that were open in both looks
    known: frozenset[RequestKey]  # requests that the loop knew of in either look
    opened: int
    released: int
    now_s: float
    since_s: Mapping[RequestKey, float] = field(default_factory=dict)  # when the assignments came here


def overdue(snapshot: Snapshot) -> list[Entry]:
    """Transfers whose lease is over."""
    return [entry for entry in snapshot.entries if entry.deadline_s < snapshot.now_s]


def orphans(snapshot: Snapshot) -> list[BlockOwner]:
    """Owners in the engine that nobody outside of it knows of."""
    return [owner for owner in snapshot.owners if (owner.request_id, owner.epoch) not in snapshot.known]


def books(snapshot: Snapshot) -> audit.KvBooks:
    """The books as they travel: transfers first, then the requests in the engine, then pins that no transfer accounts for."""
    stats = snapshot.stats
    sending = {(e.key.request_id, e.key.epoch) for e in snapshot.entries if e.key.side is Side.SEND}
    owners = [o for o in snapshot.owners if o.kind == "request" or (o.request_id, o.epoch) not in sending]
    return audit.KvBooks(
        instance_id=snapshot.instance_id,
        incarnation=snapshot.incarnation,
        total_blocks=stats.total_blocks,
        used_blocks=stats.used_blocks,
        cached_blocks=stats.cached_blocks,
        free_blocks=stats.free_blocks,
        leaked_blocks=stats.leaked_blocks,
        host_blocks=stats.host_blocks,
        host_bytes=stats.host_bytes,
        disk_blocks=stats.disk_blocks,
        disk_bytes=stats.disk_bytes,
        overdue_blocks=sum(entry.blocks for entry in overdue(snapshot)),
        opened=snapshot.opened,
        released=snapshot.released,
        entries=[*(_transfer(e, snapshot.now_s) for e in snapshot.entries), *(_owner(o, snapshot) for o in owners)],
    )


def findings(snapshot: Snapshot, integrity: str = "") -> list[audit.KvFinding]:
    """What should not be. `integrity` is the engine's own complaint, empty when it has none."""
    found = [audit.KvFinding(kind="integrity", detail=integrity)] if integrity else []
    leaked = snapshot.stats.leaked_blocks
    if leaked:
        found.append(audit.KvFinding(kind="leaked", blocks=leaked, detail="references without an owner"))
    found += [
        _finding("orphan", owner.request_id, owner.epoch, owner.blocks, f"{owner.kind} {owner.stage}: no assignment has it")
        for owner in orphans(snapshot)
    ]
    found += [
        _finding("overdue", e.key.request_id, e.key.epoch, e.blocks, f"{e.key.side.value} {e.state()}: its lease is over")
        for e in overdue(snapshot)
    ]
    if snapshot.opened - snapshot.released != len(snapshot.entries):
        detail = f"{snapshot.opened} opened, {snapshot.released} released, {len(snapshot.entries)} open"
        found.append(audit.KvFinding(kind="unbalanced", detail=detail))
    return [*found, *_unbacked(snapshot)]


def disk_findings(audit_of_disk: DiskAudit) -> list[audit.KvFinding]:
    """What is wrong with the blocks of the disk that were looked at."""
    found = [
        audit.KvFinding(
            kind="disk", blocks=1, detail=f"block {name.hex()} does not verify: it is dropped, and computed again when needed"
        )
        for name in audit_of_disk.corrupt
    ]
    if audit_of_disk.error:
        found.append(audit.KvFinding(kind="disk", detail=f"the disk cache cannot be read: {audit_of_disk.error}"))
    return found


def proof(owner: RequestKey, holder: Holder | None) -> str | None:
    """Why Redis proves that nobody owns what `owner` names here; None while somebody may.

    A request that is unknown, has ended, or runs under a newer epoch needs nothing that this epoch left behind.
    """
    _, epoch = owner
    if holder is None:
        return "Redis does not know the request"
    if holder.state not in LIVE_STATES:
        return f"the request is {holder.state}"
    if holder.epoch > epoch:
        return f"the request is at epoch {holder.epoch}"
    return None


def askable(request_id: str) -> bool:
    """True when Redis can be asked about it: what has no valid id was never submitted."""
    return is_name(request_id)


def _unbacked(snapshot: Snapshot) -> Iterable[audit.KvFinding]:
    """Transfers without the second owner that keeps their blocks: a pin on the way out, an importing sequence on the way in."""
    pinned = {(o.request_id, o.epoch) for o in snapshot.owners if o.kind == "transfer"}
    present = {(o.request_id, o.epoch) for o in snapshot.owners if o.kind == "request"}
    for entry in snapshot.entries:
        key, side = (entry.key.request_id, entry.key.epoch), entry.key.side
        if (key, side) not in snapshot.steady:
            continue
        if side is Side.SEND and key not in pinned:
            yield _finding("unbalanced", *key, entry.blocks, "sent from blocks that are not pinned")
        elif side is Side.RECEIVE and key not in present and entry.state() in ("open", "receiving"):
            yield _finding("unbalanced", *key, entry.blocks, "received into blocks of no sequence")


def _finding(kind: str, request_id: str, epoch: int, blocks: int, detail: str) -> audit.KvFinding:
    return audit.KvFinding(kind=kind, request_id=request_id, epoch=epoch, blocks=blocks, detail=detail)


def _transfer(entry: Entry, now_s: float) -> audit.KvEntry:
    return audit.KvEntry(
        request_id=entry.key.request_id,
        epoch=entry.key.epoch,
        owner=entry.key.side.value,
        stage=entry.state(),
        blocks=entry.blocks,
        writer=entry.writer if entry.key.side in (Side.RECEIVE, Side.BORROW) else "",
        age_s=max(0.0, now_s - entry.opened_s),
        lease_left_s=entry.deadline_s - now_s,
    )


def _owner(owner: BlockOwner, snapshot: Snapshot) -> audit.KvEntry:
    writer = snapshot.instance_id if owner.kind == "request" and owner.stage in _WRITTEN_HERE else ""
    return audit.KvEntry(
        request_id=owner.request_id,
        epoch=owner.epoch,
        owner=owner.kind,
        stage=owner.stage,
        blocks=owner.blocks,
        writer=writer,
        age_s=max(0.0, snapshot.now_s - snapshot.since_s.get((owner.request_id, owner.epoch), snapshot.now_s)),
    )
