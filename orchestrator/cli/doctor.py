"""`autan doctor`: who reaches whom, who may hand over to whom, and what to do about the rest."""

from __future__ import annotations

from typing import Any

import typer

from orchestrator.cli.connect import Cluster, Json, Timeout, with_client
from orchestrator.cli.kv import message_json, unanswered_json
from orchestrator.cli.output import print_json, print_table, stdout
from orchestrator.client import AsyncClient
from orchestrator.ingress.clock import wall_clock_s
from protos.wire import admin, audit

_MAX_OFFSET_S = 1.0
_WORDS = {admin.HEALTH_OK: "ok", admin.HEALTH_WARNING: "warning", admin.HEALTH_BROKEN: "BROKEN"}


def doctor(cluster: Cluster = None, timeout: Timeout = 15.0, as_json: Json = False) -> None:
    """Examine the cluster. Exit code 1 when something is broken, 3 when no ingress answers."""

    async def examine(client: AsyncClient) -> tuple[admin.DiagnoseReply, float]:
        reply = await client.diagnose()
        return reply, wall_clock_s()

    reply, here_s = with_client(examine, cluster, timeout)
    offset_s = reply.wall_clock_s - here_s
    health = admin.HEALTH_WARNING if abs(offset_s) > _MAX_OFFSET_S else admin.HEALTH_OK
    first = admin.Check(health=health, name="path", subject="cli -> ingress", detail=f"answers; its clock is {offset_s:+.1f} s")
    checks = [first, *reply.checks]
    is_broken = any(one.health == admin.HEALTH_BROKEN for one in checks)
    if as_json:
        print_json(_report(reply, checks, is_broken))
    else:
        _print(reply, checks)
    if is_broken:
        raise typer.Exit(1)


def _report(reply: admin.DiagnoseReply, checks: list[admin.Check], is_broken: bool) -> dict[str, Any]:
    return {
        "cluster": reply.cluster,
        "version": reply.version,
        "healthy": not is_broken,
        "checks": [{**message_json(one), "health": _WORDS[one.health].lower()} for one in checks],
        "matrix": [{"from": source, **message_json(probe)} for source, probe in _paths(reply)],
        "workers": [
            {**message_json(report), "peers": [probe.instance_id or probe.address for probe in report.peers]}
            for report in reply.workers
        ],
        "unanswered": unanswered_json(reply.unanswered),
    }


def _paths(reply: admin.DiagnoseReply) -> list[tuple[str, audit.PeerProbe]]:
    """Who reaches whom: the ingress the workers, they each other and the ingress."""
    found = [("ingress", probe) for probe in reply.from_ingress]
    return found + [(report.instance_id, probe) for report in reply.workers for probe in report.peers]


def _may_hand_over(source: str, probe: audit.PeerProbe) -> str:
    if source == "ingress" or not probe.instance_id or not probe.reachable:
        return "-"
    return "NO" if probe.differing else "yes"


def _print(reply: admin.DiagnoseReply, checks: list[admin.Check]) -> None:
    print_table(
        ("from", "to", "address", "reaches", "rtt", "may hand over", "shared memory"),
        [
            (
                source,
                probe.instance_id or "ingress",
                probe.address,
                "yes" if probe.reachable and probe.is_expected else "NO",
                f"{probe.rtt_s * 1000:.1f} ms" if probe.reachable else "-",
                "-"
                if "ingress" in (source, probe.instance_id or "ingress") or not probe.reachable
                else "NO"
                if probe.differing
                else "yes",
                "-" if "ingress" in (source, probe.instance_id or "ingress") else "yes" if probe.shared_memory else "no",
            )
            for source, probe in _paths(reply)
        ],
    )
    for one in checks:
        stdout.print(f"{_WORDS[one.health]:8} {one.name:14} {one.subject}: {one.detail}", markup=False)
