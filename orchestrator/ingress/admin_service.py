"""The operators' API."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator.ingress.diagnosis import Doctor
from orchestrator.ingress.kv_admin import KvAdmin
from orchestrator.ingress.live import StreamTable
from orchestrator.ingress.metrics import Metrics
from orchestrator.ingress.moving import Mover
from orchestrator.ingress.service import cancel_request
from orchestrator.ingress.validate import check_request_id
from orchestrator.policy.contract import Member, set_apart
from orchestrator.store.client import Store
from orchestrator.store.replies import InstanceRecord, MoveLog, StoreStats, View
from protos.contract.errors import InvalidRequest, StoreUnavailable
from protos.rpc import admin_pb2_grpc
from protos.wire import admin, common, differing_fields, fingerprint_key

_DEFAULT_LIMIT = 100
_MAX_LIMIT = 1000
_MAX_GRACE_S = 86_400.0

_ROLES = {"prefill": common.ROLE_PREFILL, "decode": common.ROLE_DECODE, "combined": common.ROLE_COMBINED}
_STATES = {
    "STARTING": common.INSTANCE_STATE_STARTING,
    "READY": common.INSTANCE_STATE_READY,
    "DRAINING": common.INSTANCE_STATE_DRAINING,
    "LOST": common.INSTANCE_STATE_LOST,
    "STOPPED": common.INSTANCE_STATE_STOPPED,
}
_ALIVE = frozenset({_STATES["STARTING"], _STATES["READY"], _STATES["DRAINING"]})

Gauges = Callable[[], dict[str, int]]


class AdminService(admin_pb2_grpc.AdminServicer):
    """Every call reads Redis; Status answers without it too, and says so."""

    def __init__(
        self,
        *,
        store: Store,
        table: StreamTable,
        metrics: Metrics,
        version: str,
        gauges: Gauges,
        on_shutdown: Callable[[float], None],
        kv: KvAdmin,
        doctor: Doctor,
        mover: Mover,
    ) -> None:
        self._kv = kv
        self._doctor = doctor
        self._store = store
        self._table = table
        self._metrics = metrics
        self._version = version
        self._gauges = gauges
        self._on_shutdown = on_shutdown
        self._mover = mover

    async def Status(self, request: admin.StatusRequest, context: Any) -> admin.StatusReply:
        """Instances, totals, and the counters of this ingress."""
        reply = admin.StatusReply(cluster=self._store.cluster, version=self._version)
        for name, value in {**self._metrics.snapshot(), **self._gauges()}.items():
            reply.counters[name] = max(0, value)
        try:
            view, stats, log = await self._store.view(0), await self._store.stats(), await self._store.moves()
        except StoreUnavailable:
            return reply
        reply.store_reachable = True
        fill_status(reply, view, stats)
        fill_moves(reply, log, stats)
        return reply

    async def ListRequests(self, request: admin.ListRequestsRequest, context: Any) -> admin.ListRequestsReply:
        """Live requests, oldest first."""
        if request.limit > _MAX_LIMIT:
            raise InvalidRequest(f"limit: {request.limit} is above {_MAX_LIMIT}")
        found = await self._store.requests(request.limit or _DEFAULT_LIMIT)
        return admin.ListRequestsReply(
            requests=[
                admin.RequestStatus(
                    request_id=live.request_id,
                    tenant=live.tenant,
                    state=live.state,
                    epoch=live.epoch,
                    prompt_tokens=live.prompt_tokens,
                    completion_tokens=live.n,
                    prefill_instance=live.p,
                    decode_instance=live.d,
                    age_s=max(0.0, (found.now_ms - live.submitted_ms) / 1000),
                    attempts=live.attempts,
                )
                for live in found.requests
            ]
        )

    async def CancelRequest(self, request: admin.AdminCancelRequest, context: Any) -> admin.AdminCancelReply:
        """Idempotent, for a request of any tenant."""
        check_request_id(request.request_id)
        state = await cancel_request(self._store, self._table, request.request_id, "", "operator asked for it")
        return admin.AdminCancelReply(state=state)

    async def Migrate(self, request: admin.MigrateRequest, context: Any) -> admin.MigrateReply:
        """Begins a move; what stands in its way is named."""
        check_request_id(request.request_id)
        return admin.MigrateReply(epoch=await self._mover.migrate(request.request_id, request.target_instance))

    async def Drain(self, request: admin.DrainRequest, context: Any) -> admin.DrainReply:
        """Idempotent: told again, it moves what has found room since."""
        return admin.DrainReply(moving=await self._mover.drain(request.instance_id, request.on))

    async def Shutdown(self, request: admin.ShutdownRequest, context: Any) -> admin.ShutdownReply:
        """Hands the wish on and returns."""
        if not math.isfinite(request.grace_s) or not 0 <= request.grace_s <= _MAX_GRACE_S:
            raise InvalidRequest(f"grace_s: {request.grace_s} is not between 0 and {_MAX_GRACE_S:.0f}")
        self._on_shutdown(request.grace_s)
        return admin.ShutdownReply()

    async def ListKv(self, request: admin.ListKvRequest, context: Any) -> admin.ListKvReply:
        """Who owns which KV blocks."""
        return await self._kv.list(request)

    async def VerifyKv(self, request: admin.VerifyKvRequest, context: Any) -> admin.VerifyKvReply:
        """The books of the workers against their engines."""
        return await self._kv.verify(request)

    async def CollectKv(self, request: admin.CollectKvRequest, context: Any) -> admin.CollectKvReply:
        """What nobody owns goes back."""
        return await self._kv.collect(request)

    async def Diagnose(self, request: admin.DiagnoseRequest, context: Any) -> admin.DiagnoseReply:
        """Who reaches whom."""
        return await self._doctor.examine()


def fill_status(reply: admin.StatusReply, view: View, stats: StoreStats) -> None:
    """Writes what Redis knows into the reply. Pure."""
    reply.queued = view.queued_total
    reply.running = max(0, stats.live - view.queued_total)
    reply.finished = stats.totals.get("done", 0)
    reply.failed = sum(stats.totals.get(name, 0) for name in ("failed", "dead", "expired"))
    reply.cancelled = stats.totals.get("cancelled", 0)
    reply.leader = stats.leader
    reply.leader_epoch = stats.leader_epoch
    reply.instances.extend(_instance(record, view.now_ms) for record in view.instances)
    mark_apart(reply.instances)


def fill_moves(reply: admin.StatusReply, log: MoveLog, stats: StoreStats) -> None:
    """Writes what became of the last moves, and of all. Pure."""
    reply.moves_begun = stats.totals.get("migrations_begun", 0)
    reply.moves_done = stats.totals.get("migrated", 0)
    reply.moves_stayed = stats.totals.get("migrations_stayed", 0)
    reply.moves.extend(
        admin.MoveRecord(
            age_s=max(0.0, (log.now_ms - one.at_ms) / 1000),
            event=one.event,
            request_id=one.request_id,
            epoch=one.epoch,
            source=one.source,
            target=one.target,
            why=one.why,
            note=one.note,
        )
        for one in log.records
    )


def mark_apart(instances: Sequence[admin.InstanceStatus]) -> None:
    """Writes into each instance that gets no work for its fingerprint, whose counts instead and where they differ."""
    by_name = {one.instance_id: one for one in instances}
    members = (
        Member(
            instance_id=one.instance_id,
            model=one.card.fingerprint.model,
            fingerprint=fingerprint_key(one.card.fingerprint),
            decodes=one.role in (common.ROLE_DECODE, common.ROLE_COMBINED),
        )
        for one in instances
        if one.state in _ALIVE and one.card.fingerprint.model
    )
    for name, reference in set_apart(members).items():
        apart = by_name[name]
        apart.apart_from = reference
        apart.differing.extend(differing_fields(by_name[reference].card.fingerprint, apart.card.fingerprint))


def _instance(record: InstanceRecord, now_ms: int) -> admin.InstanceStatus:
    card = common.InstanceCard.FromString(record.card)
    return admin.InstanceStatus(
        instance_id=record.instance_id,
        role=_ROLES.get(record.role, common.ROLE_UNSPECIFIED),
        state=_STATES.get(record.state, common.INSTANCE_STATE_UNSPECIFIED),
        epoch=record.incarnation,
        address=record.addr,
        node=card.node,
        card=card,
        stats=common.InstanceStats.FromString(record.stats),
        heartbeat_age_s=max(0.0, (now_ms - record.beat_ms) / 1000),
        assigned_requests=max(0, record.p_requests + record.d_requests),
        reserved_blocks=max(0, record.p_blocks + record.d_blocks),
        moves_in=max(0, record.m_in),
        moves_out=max(0, record.m_out),
    )
