"""The parts of one ingress, wired together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from configs.schema.network import IngressConfig
from orchestrator.domain.clock import Clock, SystemClock
from orchestrator.ingress.admin_service import AdminService
from orchestrator.ingress.adopt import Adopter
from orchestrator.ingress.auth import Authoriser
from orchestrator.ingress.certificate_checks import CertificateChecks
from orchestrator.ingress.departures import Departures
from orchestrator.ingress.diagnosis import Doctor
from orchestrator.ingress.intake import Intake
from orchestrator.ingress.journal import Journal
from orchestrator.ingress.kv_admin import KvAdmin
from orchestrator.ingress.live import StreamTable
from orchestrator.ingress.metrics import Metrics
from orchestrator.ingress.model import ServedModel
from orchestrator.ingress.moving import Mover, SignMove, unsigned_move
from orchestrator.ingress.owner import Ownership
from orchestrator.ingress.recovery import Recovery
from orchestrator.ingress.service import InferenceService
from orchestrator.ingress.token_sink import TokenSink
from orchestrator.ingress.validate import Limits
from orchestrator.ingress.watch import Watch
from orchestrator.ingress.worker_calls import WorkerCalls
from orchestrator.store.client import Store
from protos.rpc import Dialer


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSettings:
    """What an ingress needs to know, besides the store and the model."""

    config: IngressConfig
    version: str
    ingress_id: str = "ingress-0"
    lease_s: float = 3.0
    request_timeout_s: float = 600.0
    max_queued: int = 4096
    max_migrations: int = 3
    linger_s: float = 0.5  # a client that left may come back for so long before its request is cancelled
    stall_s: float = 30.0  # a client that reads nothing for so long loses its stream
    gap_patience_s: float = 10.0  # a worker that was asked to replay may lack tokens for so long before they are given up
    max_backlog_tokens: int = 1_000_000  # accepted while Redis is away, before workers have to wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything between the two listeners and Redis."""

    metrics: Metrics
    owner: Ownership
    table: StreamTable
    journal: Journal
    watch: Watch
    intake: Intake
    departures: Departures
    service: InferenceService
    admin: AdminService
    sink: TokenSink


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What the services stand on."""

    store: Store
    model: ServedModel
    clock: Clock
    limits: Limits
    metrics: Metrics
    table: StreamTable
    owner: Ownership
    journal: Journal
    adopter: Adopter
    departures: Departures


def assemble(
    *,
    settings: IngressSettings,
    store: Store,
    model: ServedModel,
    authorise: Authoriser,
    sink_address: str,
    on_shutdown: Callable[[float], None],
    clock: Clock | None = None,
    workers: Dialer | None = None,
    certificates: CertificateChecks | None = None,
    sign_move: SignMove = unsigned_move,
) -> Parts:
    """Makes the parts; nothing runs yet."""
    base = _base(settings, store, model, sink_address, clock=clock or SystemClock())
    metrics, table, owner, journal = base.metrics, base.table, base.owner, base.journal
    watch = _watch(settings, base)
    intake = _intake(settings, base, watch)
    service = _service(settings, base, intake, authorise)

    def gauges() -> dict[str, int]:
        return {
            "streams_open": service.open_streams,
            "requests_live": len(table),
            "backlog_tokens": journal.backlog_tokens,
            "ingress_epoch": owner.epoch,
        }

    calls = WorkerCalls(store, workers or Dialer())
    admin = AdminService(
        store=store,
        table=table,
        metrics=metrics,
        version=settings.version,
        gauges=gauges,
        on_shutdown=on_shutdown,
        kv=KvAdmin(calls),
        doctor=Doctor(store, calls, settings.version, sink_address, certificates),
        mover=Mover(store, settings.max_migrations, sign_move),
    )
    return Parts(
        metrics=metrics,
        owner=owner,
        table=table,
        journal=journal,
        watch=watch,
        intake=intake,
        departures=base.departures,
        service=service,
        admin=admin,
        sink=TokenSink(table=table, journal=journal, watch=watch, metrics=metrics),
    )


def _base(settings: IngressSettings, store: Store, model: ServedModel, sink_address: str, *, clock: Clock) -> Base:
    config = settings.config
    limits = Limits(default_max_tokens=config.default_max_tokens, default_timeout_s=settings.request_timeout_s)
    metrics = Metrics()
    table = StreamTable(metrics)
    owner = Ownership(store, settings.ingress_id, sink_address, settings.lease_s)
    journal = Journal(
        store,
        owner,
        table,
        metrics,
        tick_s=config.tick_ms / 1000,
        max_backlog_tokens=settings.max_backlog_tokens,
    )
    adopter = Adopter(
        store=store,
        owner=owner,
        table=table,
        journal=journal,
        model=model,
        clock=clock,
        metrics=metrics,
        max_timeout_s=limits.max_timeout_s,
    )
    return Base(
        store=store,
        model=model,
        clock=clock,
        limits=limits,
        metrics=metrics,
        table=table,
        owner=owner,
        journal=journal,
        adopter=adopter,
        departures=Departures(store, table, metrics, settings.linger_s),
    )


def _watch(settings: IngressSettings, base: Base) -> Watch:
    recovery = Recovery(
        store=base.store,
        table=base.table,
        journal=base.journal,
        adopter=base.adopter,
        clock=base.clock,
        patience_s=settings.gap_patience_s,
    )
    return Watch(
        store=base.store,
        owner=base.owner,
        table=base.table,
        journal=base.journal,
        adopter=base.adopter,
        recovery=recovery,
        clock=base.clock,
    )


def _intake(settings: IngressSettings, base: Base, watch: Watch) -> Intake:
    return Intake(
        store=base.store,
        owner=base.owner,
        table=base.table,
        journal=base.journal,
        watch=watch,
        adopter=base.adopter,
        departures=base.departures,
        model=base.model,
        limits=base.limits,
        clock=base.clock,
        metrics=base.metrics,
        queue_limit=settings.max_queued,
    )


def _service(settings: IngressSettings, base: Base, intake: Intake, authorise: Authoriser) -> InferenceService:
    return InferenceService(
        authorise=authorise,
        intake=intake,
        adopter=base.adopter,
        departures=base.departures,
        table=base.table,
        store=base.store,
        model=base.model,
        metrics=base.metrics,
        max_streams=settings.config.max_streams,
        max_event_tokens=settings.config.max_buffered_tokens,
        stall_s=settings.stall_s,
    )
