"""What an instance says of itself: fingerprint, card, statistics."""

from __future__ import annotations

from pathlib import Path

from configs.worker_spec import WorkerSpec
from protos.contract.redis_names import PROTOCOL_VERSION
from protos.wire import common
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineStats, KvLayout, ModelIdentity
from workers.kv_transfer.counters import TransferCounters
from workers.service.prefix_exchange import PrefixExchange

MAX_REASON_CHARS = 256


def fingerprint_of(identity: ModelIdentity, layout: KvLayout) -> common.Fingerprint:
    """What must be equal on both sides of a hand-off.

    Every field counts. What may differ is on the card: ranks (KV leaves and enters an instance as full rows, whatever share
    of them each rank keeps), pool size, batch limits and role.
    """
    return common.Fingerprint(
        model=identity.model,
        architecture=identity.architecture,
        weights_digest=identity.weights_digest,
        tokenizer_digest=identity.tokenizer_digest,
        template_digest=identity.template_digest,
        dtype=layout.dtype,
        block_tokens=layout.block_tokens,
        num_layers=layout.num_layers,
        row_bytes=layout.row_bytes,
        kv_layout=layout.name,
        protocol_version=PROTOCOL_VERSION,
    )


def card_of(spec: WorkerSpec, engine: Engine, address: str) -> common.InstanceCard:
    """What Redis keeps of a registered instance."""
    return common.InstanceCard(
        instance_id=spec.instance_id,
        role=f"ROLE_{spec.role.upper()}",
        address=address,
        fingerprint=fingerprint_of(engine.identity, engine.layout),
        total_blocks=engine.stats().total_blocks,
        vocab_size=engine.identity.vocab_size,
        context_tokens=engine.identity.context_tokens,
        max_batch_tokens=spec.engine.max_batch_tokens,
        max_running=spec.engine.max_running,
        node=spec.node_address or "127.0.0.1",
        ranks=spec.ranks,
    )


def cache_folder(spec: WorkerSpec) -> Path | None:
    """The folder of the instance's disk cache: its own, below the path of the cluster file or of the spec."""
    disk = spec.engine.disk_cache
    base = (disk.path if disk is not None else None) or spec.cache_dir
    return Path(base) / spec.cluster / spec.instance_id if base else None


def stats_of(
    stats: EngineStats, counters: TransferCounters, overdue_blocks: int, unacked_tokens: int, prefixes: PrefixExchange
) -> common.InstanceStats:
    """What goes along with every renewal; blocks of overdue hand-offs count as leaked."""
    found = common.InstanceStats(
        total_blocks=stats.total_blocks,
        used_blocks=stats.used_blocks,
        cached_blocks=stats.cached_blocks,
        free_blocks=stats.free_blocks,
        running=stats.running,
        waiting=stats.waiting,
        holding=stats.holding,
        importing=stats.importing,
        steps=stats.steps,
        prefill_chunks=stats.prefill_chunks,
        prefill_tokens=stats.prefill_tokens,
        prefix_hit_tokens=stats.prefix_hit_tokens,
        decode_tokens=stats.decode_tokens,
        preemptions=stats.preemptions,
        kv_blocks_sent=counters.kv_blocks_sent,
        kv_bytes_sent=counters.kv_bytes_sent,
        kv_blocks_received=counters.kv_blocks_received,
        kv_bytes_received=counters.kv_bytes_received,
        handoffs_committed=counters.handoffs_committed,
        handoffs_failed=counters.handoffs_failed,
        stale_refused=counters.stale_refused,
        leaked_blocks=stats.leaked_blocks + overdue_blocks,
        unacked_tokens=unacked_tokens,
        expert_visits=stats.expert_visits,
        host_blocks=stats.host_blocks,
        host_restored_tokens=stats.host_restored_tokens,
        host_bytes=stats.host_bytes,
        disk_blocks=stats.disk_blocks,
        disk_bytes=stats.disk_bytes,
        disk_restored_tokens=stats.disk_restored_tokens,
        corrupt_blocks=stats.corrupt_blocks,
        tier_errors=stats.tier_errors,
        tier_off_reason=stats.tier_off_reason[:MAX_REASON_CHARS],
        restoring=stats.restoring,
    )
    prefixes.report(found)
    return found
