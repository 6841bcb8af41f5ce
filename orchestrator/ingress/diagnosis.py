"""`autan doctor`: what the ingress finds when it asks the store and every worker, and what that means."""

from __future__ import annotations

import time
from typing import Any

from orchestrator.ingress.certificate_checks import CertificateChecks
from orchestrator.ingress.clock import wall_clock_s
from orchestrator.ingress.worker_calls import ALIVE, WorkerCalls
from orchestrator.store.client import Store
from orchestrator.store.replies import InstanceRecord, StoreStats
from protos.contract.errors import StoreUnavailable
from protos.contract.redis_names import PROTOCOL_VERSION
from protos.wire import admin, audit, common, differing_fields, fingerprint_key, worker

_PROBE_S = 2.0
_TIMEOUT_S = 6.0
_MAX_OFFSET_S = 1.0
_MAX_BEAT_S = 3.0

OK, WARNING, BROKEN = admin.HEALTH_OK, admin.HEALTH_WARNING, admin.HEALTH_BROKEN


class Doctor:
    """One examination for each call."""

    def __init__(
        self,
        store: Store,
        workers: WorkerCalls,
        version: str,
        sink_address: str,
        certificates: CertificateChecks | None = None,
    ) -> None:
        self._store = store
        self._workers = workers
        self._version = version
        self._sink_address = sink_address
        self._certificates = certificates

    async def examine(self) -> admin.DiagnoseReply:
        """Never raises for what is broken: the reply says so."""
        reply = admin.DiagnoseReply(cluster=self._store.cluster, version=self._version)
        try:
            began_s = time.monotonic()
            stats = await self._store.stats()
            rtt_s = time.monotonic() - began_s
            view = await self._store.view(0)
        except StoreUnavailable as error:
            reply.checks.append(check(BROKEN, "store", "ingress", f"{error.message}; is the store running?"))
            reply.wall_clock_s = wall_clock_s()
            return reply
        reply.checks.append(check(OK, "store", "ingress", f"answers in {rtt_s * 1000:.1f} ms"))
        alive = tuple(record for record in view.instances if record.state in ALIVE)
        peers = [worker.PeerAddress(instance_id=r.instance_id, address=r.addr, incarnation=r.incarnation) for r in alive]

        async def question(stub: Any, record: InstanceRecord) -> tuple[audit.PeerProbe, audit.SelfReport]:
            probe = await _probe(stub, record)
            request = worker.WorkerDiagnoseRequest(
                peers=[peer for peer in peers if peer.instance_id != record.instance_id],
                sink_address=self._sink_address,
                timeout_s=_PROBE_S,
            )
            report: audit.SelfReport = await stub.Diagnose(request, timeout=_TIMEOUT_S)
            return probe, report

        answers = await self._workers.ask(alive, question, _TIMEOUT_S)
        reply.workers.extend(report for _, (_, report) in answers.found)
        reply.from_ingress.extend(probe for _, (probe, _) in answers.found)
        reply.from_ingress.extend(
            audit.PeerProbe(instance_id=one.instance_id, address=one.address, error=one.error.message)
            for one in answers.unanswered
        )
        reply.unanswered.extend(answers.unanswered)
        reply.wall_clock_s = wall_clock_s()
        reply.checks.extend(_of_cluster(stats, view.instances, view.now_ms))
        reply.checks.extend(
            check(BROKEN, "worker", one.instance_id, f"the ingress gets no answer: {one.error.message}")
            for one in answers.unanswered
        )
        for report in reply.workers:
            reply.checks.extend(_of_worker(report, self._version))
        reply.checks.extend(_of_fingerprints(alive))
        if self._certificates is not None:
            reply.checks.extend(await self._certificates.examine(alive))
        return reply


async def _probe(stub: Any, record: InstanceRecord) -> audit.PeerProbe:
    """One call on the open connection from the ingress to a worker."""
    began_s = time.monotonic()
    status = await stub.Status(worker.WorkerStatusRequest(), timeout=_TIMEOUT_S)
    is_expected = status.incarnation == record.incarnation
    return audit.PeerProbe(
        instance_id=record.instance_id,
        address=record.addr,
        reachable=True,
        rtt_s=time.monotonic() - began_s,
        is_expected=is_expected,
        error="" if is_expected else f"it is incarnation {status.incarnation}, the registry has {record.incarnation}",
    )


def check(health: admin.Health, name: str, subject: str, detail: str) -> admin.Check:
    """One line of the report."""
    return admin.Check(health=health, name=name, subject=subject, detail=detail)


def _of_cluster(stats: StoreStats, records: tuple[InstanceRecord, ...], now_ms: int) -> list[admin.Check]:
    found = [
        check(OK, "leader", stats.leader, f"epoch {stats.leader_epoch}")
        if stats.leader
        else check(BROKEN, "leader", "core", "nobody leads: nothing is scheduled; is an orchestrator running?")
    ]
    for record in records:
        beat_s = (now_ms - record.beat_ms) / 1000
        leaked = common.InstanceStats.FromString(record.stats).leaked_blocks
        if record.state not in ALIVE:
            if record.state == "LOST":
                found.append(check(BROKEN, "instance", record.instance_id, f"LOST; last heard of {beat_s:.0f} s ago"))
            continue
        health = BROKEN if beat_s > _MAX_BEAT_S else OK if record.state == "READY" else WARNING
        found.append(check(health, "instance", record.instance_id, f"{record.state}, heard of {beat_s:.1f} s ago"))
        if leaked:
            found.append(check(BROKEN, "kv", record.instance_id, f"{leaked} leaked blocks: run `autan kv verify`"))
    return found


def _of_worker(report: audit.SelfReport, version: str) -> list[admin.Check]:
    name, found = report.instance_id, []
    if not report.store_reachable:
        found.append(check(BROKEN, "store", name, "the worker does not reach the store: check network and URL"))
    elif abs(report.store_offset_s) > _MAX_OFFSET_S:
        text = f"its wall clock is {-report.store_offset_s:+.1f} s from the store's: logs and certificates disagree; run NTP"
        found.append(check(WARNING, "clock", name, text))
    else:
        found.append(check(OK, "clock", name, f"{-report.store_offset_s * 1000:+.1f} ms from the store's"))
    if report.protocol_version != PROTOCOL_VERSION:
        text = f"speaks protocol {report.protocol_version}, the ingress {PROTOCOL_VERSION}: install the same version"
        found.append(check(BROKEN, "version", name, text))
    elif report.version != version:
        found.append(check(WARNING, "version", name, f"runs {report.version}, the ingress {version}"))
    for probe in report.peers:
        peer = probe.instance_id or f"ingress {probe.address}"
        if not probe.reachable or not probe.is_expected:
            found.append(check(BROKEN, "path", f"{name} -> {peer}", f"{probe.address}: {probe.error}"))
    return found


def _of_fingerprints(records: tuple[InstanceRecord, ...]) -> list[admin.Check]:
    """Instances of one model that do not serve the same thing, against the first of them."""
    found: list[admin.Check] = []
    first: dict[str, tuple[str, common.Fingerprint]] = {}
    for record in records:
        mine = common.InstanceCard.FromString(record.card).fingerprint
        name, reference = first.setdefault(mine.model, (record.instance_id, mine))
        if fingerprint_key(mine) != fingerprint_key(reference):
            text = f"does not serve what {name} does: {'; '.join(differing_fields(reference, mine))}"
            found.append(check(BROKEN, "compatibility", record.instance_id, text))
    return found or [check(OK, "compatibility", "all", "every instance of a model serves the same thing")]
