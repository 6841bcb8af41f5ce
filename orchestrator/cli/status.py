"""`autan status`: every instance with its role, epoch and KV blocks, and the totals of the cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict

from orchestrator.cli.connect import Cluster, Json, Timeout, with_client
from orchestrator.cli.output import print_json, print_table, stdout
from protos.wire import admin, common


def role_name(role: int) -> str:
    """ROLE_PREFILL as `prefill`."""
    return common.Role.Name(role).removeprefix("ROLE_").lower()


def state_name(state: int) -> str:
    """INSTANCE_STATE_READY as `READY`."""
    return common.InstanceState.Name(state).removeprefix("INSTANCE_STATE_")


def instance_json(one: admin.InstanceStatus) -> dict[str, Any]:
    """One instance as `--json` prints it. `kv_blocks.used` counts blocks that a request or a transfer refers to."""
    return {
        "instance_id": one.instance_id,
        "role": role_name(one.role),
        "state": state_name(one.state),
        "epoch": one.epoch,
        "address": one.address,
        "node": one.node,
        "ranks": one.card.ranks,
        "heartbeat_age_s": round(one.heartbeat_age_s, 3),
        "assigned_requests": one.assigned_requests,
        "moves_in": one.moves_in,
        "moves_out": one.moves_out,
        "kv_blocks": {
            "total": one.stats.total_blocks,
            "used": one.stats.used_blocks,
            "free": one.stats.free_blocks,
            "cached": one.stats.cached_blocks,
            "host": one.stats.host_blocks,
            "disk": one.stats.disk_blocks,
            "reserved": one.reserved_blocks,
            "leaked": one.stats.leaked_blocks,
        },
        "counters": counters(one.stats),
        "fetches_failed": {reason: int(count) for reason, count in sorted(one.stats.fetches_failed.items())},
        "tiers": {
            "host_bytes": one.stats.host_bytes,
            "disk_bytes": one.stats.disk_bytes,
            "hit_tokens": {
                "device": max(0, one.stats.prefix_hit_tokens - one.stats.host_restored_tokens - one.stats.disk_restored_tokens),
                "host": one.stats.host_restored_tokens,
                "disk": one.stats.disk_restored_tokens,
            },
            "corrupt_blocks": one.stats.corrupt_blocks,
            "errors": one.stats.tier_errors,
            "off_reason": one.stats.tier_off_reason or None,
        },
        "expert_visits": list(one.stats.expert_visits),
        "apart_from": one.apart_from or None,
        "differing": list(one.differing),
    }


def move_json(one: admin.MoveRecord) -> dict[str, Any]:
    """One line of the log of moves as `--json` prints it."""
    return {
        "age_s": round(one.age_s, 3),
        "event": one.event,
        "request_id": one.request_id,
        "epoch": one.epoch,
        "source": one.source,
        "target": one.target,
        "why": one.why,
        "note": one.note,
    }


_TEXTS = frozenset({"tier_off_reason"})


def counters(stats: common.InstanceStats) -> dict[str, int]:
    """Every single number that a worker reports, by field name."""
    fields = (field.name for field in stats.DESCRIPTOR.fields if not field.is_repeated and field.name not in _TEXTS)
    return {name: int(getattr(stats, name)) for name in fields}


def kv_note(reply: admin.StatusReply) -> str:
    """What everybody who reads tokens of this cluster should know of its hand-offs; empty: nothing."""
    if "kv_compression_fp8" in reply.counters:
        return "network.kv_compression is fp8: tokens may differ from those of one instance alone"
    return ""


def fetches_text(stats: Sequence[common.InstanceStats]) -> str:
    """What came from the caches of other instances, in one line; empty when nothing was to come."""
    failed: Counter[str] = Counter()
    for one in stats:
        failed.update(one.fetches_failed)
    fetches = sum(one.fetches for one in stats)
    if not fetches and not failed:
        return ""
    blocks, size = sum(one.fetched_blocks for one in stats), sum(one.fetched_bytes for one in stats)
    why = "".join(f", {count} x {reason}" for reason, count in sorted(failed.items()))
    return f"fetched prefixes: {fetches} prompts, {blocks} blocks, {size / 1e6:.1f} MB; failed: {failed.total()}{why}"


def status_json(reply: admin.StatusReply) -> dict[str, Any]:
    """The whole status as `--json` prints it."""
    return {
        "cluster": reply.cluster,
        "version": reply.version,
        "store_reachable": reply.store_reachable,
        "leader": reply.leader,
        "leader_epoch": reply.leader_epoch,
        "requests": {
            "queued": reply.queued,
            "running": reply.running,
            "finished": reply.finished,
            "failed": reply.failed,
            "cancelled": reply.cancelled,
        },
        "instances": [instance_json(one) for one in reply.instances],
        "moves": {
            "begun": reply.moves_begun,
            "done": reply.moves_done,
            "stayed": reply.moves_stayed,
            "log": [move_json(one) for one in reply.moves],
        },
        "ingress": {name: int(value) for name, value in MessageToDict(reply).get("counters", {}).items()},
    }


def print_tiers(instances: Iterable[admin.InstanceStatus]) -> None:
    """One line for each instance that keeps blocks below its pool, and why its disk is off."""
    for one in instances:
        stats = one.stats
        if stats.host_blocks or stats.disk_blocks or stats.host_restored_tokens or stats.disk_restored_tokens:
            text = (
                f"{one.instance_id} keeps {stats.host_blocks} KV blocks in host memory ({stats.host_bytes / 1e9:.2f} GB) and "
                f"{stats.disk_blocks} on disk ({stats.disk_bytes / 1e9:.2f} GB); brought back {stats.host_restored_tokens} and "
                f"{stats.disk_restored_tokens} tokens, dropped {stats.corrupt_blocks} corrupt blocks"
            )
            stdout.print(text, markup=False)
        if stats.tier_off_reason:
            text = f"{one.instance_id} writes nothing to its disk cache ({stats.tier_errors} errors): {stats.tier_off_reason}"
            stdout.print(text, markup=False)


def status(cluster: Cluster = None, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """Show instances, KV blocks and request totals."""
    reply = with_client(lambda client: client.status(), cluster, timeout)
    if as_json:
        print_json(status_json(reply))
        return
    store = "" if reply.store_reachable else "   STORE UNREACHABLE"
    stdout.print(f"cluster {reply.cluster}   leader {reply.leader or '-'} (epoch {reply.leader_epoch}){store}", markup=False)
    stdout.print(
        f"requests: {reply.queued} queued, {reply.running} running, {reply.finished} finished, "
        f"{reply.failed} failed, {reply.cancelled} cancelled"
    )
    print_table(
        ("instance", "role", "ranks", "state", "epoch", "KV used", "free", "cached", "total", "requests", "beat", "address"),
        [
            (
                one.instance_id, role_name(one.role), one.card.ranks, state_name(one.state), one.epoch, one.stats.used_blocks,
                one.stats.free_blocks, one.stats.cached_blocks, one.stats.total_blocks, one.assigned_requests,
                f"{one.heartbeat_age_s:.1f} s", one.address,
            )
            for one in reply.instances
        ],
    )  # fmt: skip
    if note := kv_note(reply):
        stdout.print(note, markup=False)
    if reply.moves_begun:
        last = next((one for one in reply.moves if one.event == "begun"), None)
        why = f"; the last: {last.request_id} from {last.source} to {last.target}, {last.why}: {last.note}" if last else ""
        stdout.print(
            f"moves: {reply.moves_begun} begun, {reply.moves_done} done, {reply.moves_stayed} stayed{why}", markup=False
        )
    fetched = fetches_text([one.stats for one in reply.instances])
    if fetched:
        stdout.print(fetched, markup=False)
    print_tiers(reply.instances)
    for one in reply.instances:
        if one.apart_from:
            text = f"{one.instance_id} gets no work: it differs from {one.apart_from}: {'; '.join(one.differing)}"
            stdout.print(text, markup=False)
