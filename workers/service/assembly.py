"""Puts the parts of one worker together. No part does anything before the host starts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from configs.worker_spec import WorkerSpec
from protos.contract.capability import GrantKind
from protos.contract.errors import AutanError
from protos.wire import common
from workers.engine_api.protocol import Engine
from workers.kv_transfer.authority import Authority
from workers.kv_transfer.claims import Addressee
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.handoff_job import SendContext
from workers.kv_transfer.hooks import ReceiveLimits
from workers.kv_transfer.ledger import Ledger
from workers.kv_transfer.prefix_receiver import PrefixReceiver
from workers.kv_transfer.receiver import Receiver
from workers.service.arrivals import Arrivals
from workers.service.assignments import Assignment, Assignments
from workers.service.cache_feed import CacheFeed
from workers.service.coordinator import Coordinator, Parts
from workers.service.diagnosis import Diagnosis, DiagnosisContext
from workers.service.engine_thread import EngineThread
from workers.service.failpoints import Failpoints
from workers.service.failures import Failures
from workers.service.handoff_tasks import HandoffTasks
from workers.service.identity import cache_folder, fingerprint_of
from workers.service.kv_audit import AuditContext, KvAudit
from workers.service.membership import Membership
from workers.service.moves import Moves
from workers.service.outbox import Outbox, OutboxContext
from workers.service.prefill_speed import PrefillSpeed
from workers.service.prefix_exchange import PrefixExchange
from workers.service.prefix_fetch import PrefixFetches
from workers.service.prefix_lending import Lendings
from workers.service.push_wire import PushDialer
from workers.service.retrying import while_store_is_away
from workers.service.store import WorkerStore
from workers.service.wire import Wire

_WINDOWS = 4  # credit of one transfer is this part of the receiver's
_MAX_WINDOW_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What the host brings: its spec, a started engine, and how to reach its loops."""

    spec: WorkerSpec
    me: Membership
    thread: EngineThread
    store: WorkerStore
    failpoints: Failpoints
    poll_inbox: Callable[[], None]
    beat_soon: Callable[[], None]
    authority: Authority
    wire: Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """One worker, taken apart."""

    assignments: Assignments
    ledger: Ledger
    counters: TransferCounters
    outbox: Outbox
    handoffs: HandoffTasks
    moves: Moves
    receiver: Receiver
    failures: Failures
    coordinator: Coordinator
    audit: KvAudit
    diagnosis: Diagnosis
    prefixes: PrefixExchange


def window_bytes(spec: WorkerSpec) -> int:
    """Bytes that one transfer may have on the way: at least two frames, so that grants never starve the sender."""
    network = spec.network
    return max(2 * network.frame_bytes, min(network.credit_bytes // _WINDOWS, _MAX_WINDOW_BYTES))


def assemble(base: Base) -> Assembly:
    """The parts around a started engine."""
    me, thread, timing = base.me, base.thread, base.spec.timing
    assignments, ledger, counters = Assignments(), Ledger(), TransferCounters()
    failures = _failures(base)

    def on_finished(request_id: str, epoch: int) -> None:
        coordinator.finished(request_id, epoch)

    def on_failed(assignment: Assignment, error: AutanError) -> None:
        if not assignment.ended:
            coordinator.give_up(assignment, error)

    def on_arrived(assignment: Assignment) -> None:
        coordinator.arrived(assignment)

    def on_moved(assignment: Assignment) -> None:
        coordinator.moved(assignment)

    outbox = _outbox(base, on_finished)
    handoffs, context = _handoffs(base, ledger, counters)
    moves = _moves(base, handoffs, context, ledger, outbox, on_moved)
    arrivals = _arrivals(base, assignments, outbox, on_failed, on_arrived)
    receiver = _receiver(base, arrivals, ledger, counters)
    prefixes = _prefixes(base, handoffs, context, ledger, arrivals)
    coordinator = Coordinator(
        Parts(
            me=me,
            engine=thread,
            store=base.store,
            assignments=assignments,
            outbox=outbox,
            handoffs=handoffs,
            moves=moves,
            prefixes=prefixes,
            receiver=receiver,
            arrivals=arrivals,
            failures=failures,
            failpoints=base.failpoints,
            fingerprint=fingerprint_of(thread.engine.identity, thread.engine.layout),
            lease_s=timing.lease_s,
            patience_s=timing.lease_s,
        )
    )
    return Assembly(
        assignments=assignments,
        ledger=ledger,
        counters=counters,
        outbox=outbox,
        handoffs=handoffs,
        moves=moves,
        receiver=receiver,
        failures=failures,
        coordinator=coordinator,
        audit=_audit(base, assignments, ledger, handoffs, receiver, prefixes),
        diagnosis=_diagnosis(base),
        prefixes=prefixes,
    )


def _failures(base: Base) -> Failures:
    spec = base.spec
    return Failures(
        me=base.me,
        store=base.store,
        max_attempts=spec.scheduling.max_attempts,
        retain_s=spec.timing.retain_s,
        patience_s=spec.timing.lease_s,
    )


def _audit(
    base: Base,
    assignments: Assignments,
    ledger: Ledger,
    handoffs: HandoffTasks,
    receiver: Receiver,
    prefixes: PrefixExchange,
) -> KvAudit:
    context = AuditContext(
        me=base.me,
        engine=base.thread,
        store=base.store,
        assignments=assignments,
        ledger=ledger,
        handoffs=handoffs,
        receiver=receiver,
        prefixes=prefixes,
        cache_base=folder.parent if (folder := cache_folder(base.spec)) is not None else None,
    )
    return KvAudit(context)


def _diagnosis(base: Base) -> Diagnosis:
    engine = base.thread.engine
    fingerprint = fingerprint_of(engine.identity, engine.layout)
    return Diagnosis(DiagnosisContext(me=base.me, fingerprint=fingerprint, store=base.store, wire=base.wire))


def _outbox(base: Base, on_finished: Callable[[str, int], None]) -> Outbox:
    return Outbox(
        OutboxContext(
            instance_id=base.me.instance_id,
            incarnation=lambda: base.me.number,
            on_finished=on_finished,
            on_refused=lambda request_id, epoch: base.beat_soon(),
            reach=base.failpoints.reach,
            dialer=base.wire.ingresses,
            write_timeout_s=base.spec.timing.progress_timeout_s,
        )
    )


def _handoffs(base: Base, ledger: Ledger, counters: TransferCounters) -> tuple[HandoffTasks, SendContext]:
    timing, thread, store = base.spec.timing, base.thread, base.store

    def on_progress(request_id: str, epoch: int) -> None:
        handoffs.touch(request_id, epoch)

    context = SendContext(
        port=thread,
        holder_of=lambda request_id: while_store_is_away(lambda: store.holder_of(request_id), timing.lease_s),
        counters=counters,
        frame_bytes=base.spec.network.frame_bytes,
        streams=base.spec.network.streams,
        stream_bytes=base.spec.network.stream_bytes,
        progress_timeout_s=timing.progress_timeout_s,
        open_patience_s=timing.kv_lease_s,
        compression=base.spec.network.kv_compression,
        segment=lambda: thread.memory.segment,
        dial=PushDialer() if base.spec.network.tls is None else None,
        engine_alive=lambda: thread.stalled_s() < timing.progress_timeout_s,
        reach=base.failpoints.reach,
        on_progress=on_progress,
    )
    handoffs = HandoffTasks(
        me=base.me,
        engine=thread,
        ledger=ledger,
        context=context,
        dialer=base.wire.peers,
        reach=base.failpoints.reach,
    )
    return handoffs, context


def _moves(
    base: Base,
    handoffs: HandoffTasks,
    context: SendContext,
    ledger: Ledger,
    outbox: Outbox,
    on_moved: Callable[[Assignment], None],
) -> Moves:
    engine = base.thread.engine
    return Moves(
        me=base.me,
        engine=base.thread,
        store=base.store,
        ledger=ledger,
        outbox=outbox,
        context=context,
        channels=handoffs.channels,
        fingerprint=fingerprint_of(engine.identity, engine.layout),
        on_moved=on_moved,
        pause_patience_s=base.spec.timing.lease_s,
    )


def _arrivals(
    base: Base,
    assignments: Assignments,
    outbox: Outbox,
    on_failed: Callable[[Assignment, AutanError], None],
    on_arrived: Callable[[Assignment], None],
) -> Arrivals:
    engine = base.thread.engine
    fingerprint = fingerprint_of(engine.identity, engine.layout)
    return Arrivals(
        me=base.me,
        here=lambda: _addressee(base.me, engine, fingerprint),
        assignments=assignments,
        store=base.store,
        outbox=outbox,
        poll_inbox=base.poll_inbox,
        on_failed=on_failed,
        on_arrived=on_arrived,
        lease_s=base.spec.timing.lease_s,
        commit_patience_s=base.spec.timing.lease_s,
    )


def _prefixes(base: Base, handoffs: HandoffTasks, context: SendContext, ledger: Ledger, arrivals: Arrivals) -> PrefixExchange:
    timing, engine = base.spec.timing, base.thread.engine
    counters = TransferCounters()

    async def reach(point: str) -> None:
        await base.failpoints.reach(point.replace("handoff.", "lend.").replace("import.", "fetch."))

    feed = CacheFeed(base.thread, lambda: base.me.incarnation)
    base.thread.hear_cache(feed.take)
    fetches = PrefixFetches(here=arrivals.here, poll_inbox=base.poll_inbox, longest_wait_s=timing.progress_timeout_s / 2)
    return PrefixExchange(
        feed=feed,
        fetches=fetches,
        lendings=Lendings(
            me=base.me,
            engine=base.thread,
            ledger=ledger,
            context=replace(context, counters=counters, reach=reach),
            channels=handoffs.channels,
            fingerprint=fingerprint_of(engine.identity, engine.layout),
        ),
        receiver=PrefixReceiver(
            port=base.thread,
            hooks=fetches,
            ledger=ledger,
            counters=counters,
            limits=_limits(base),
            reach=reach,
            authority=base.authority.of_kind(GrantKind.PREFIX),
            compression="none" if base.spec.network.kv_compression == "none" else "lossless",
        ),
        counters=counters,
        speed=PrefillSpeed(),
    )


def _limits(base: Base) -> ReceiveLimits:
    timing = base.spec.timing
    return ReceiveLimits(
        window_bytes=window_bytes(base.spec),
        streams=base.spec.network.streams,
        progress_timeout_s=timing.progress_timeout_s,
        remember_s=timing.kv_lease_s,
        shared_memory=base.spec.network.shared_memory,
    )


def _receiver(base: Base, arrivals: Arrivals, ledger: Ledger, counters: TransferCounters) -> Receiver:
    return Receiver(
        port=base.thread,
        hooks=arrivals,
        ledger=ledger,
        counters=counters,
        limits=_limits(base),
        reach=base.failpoints.reach,
        authority=base.authority,
        compression=base.spec.network.kv_compression,
    )


def _addressee(me: Membership, engine: Engine, fingerprint: common.Fingerprint) -> Addressee:
    return Addressee(
        instance_id=me.instance_id,
        incarnation=me.number,
        fingerprint=fingerprint,
        layout=engine.layout,
        vocab_size=engine.identity.vocab_size,
    )
