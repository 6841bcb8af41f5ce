"""What the engine tells its tiers of a step, and what they say of themselves."""

from __future__ import annotations

from typing import Any

from workers.batching.cache_tiers import CacheTiers
from workers.batching.scheduler import Plan
from workers.batching.tier_policy import PrefillCost
from workers.engine_api.types import KvLayout


def observe_step(cost: PrefillCost, todo: Plan, took_s: float) -> None:
    """Takes a step that was carried out, `num_computed` still as before it, as news of what prompt rows cost."""
    rows = sum(chunk.count for chunk in todo.chunks)
    if rows:
        positions = sum(chunk.count * (chunk.sequence.num_computed + chunk.count / 2) for chunk in todo.chunks)
        cost.observe(rows, positions, took_s * rows / (rows + len(todo.decodes)))


def tier_gauges(tiers: CacheTiers | None, layout: KvLayout) -> dict[str, Any]:
    """The fields of EngineStats about tiers."""
    if tiers is None:
        return {}
    disk, counters = tiers.disk, tiers.counters
    gauges: dict[str, Any] = {
        "host_blocks": len(tiers.host),
        "host_bytes": len(tiers.host) * layout.block_bytes,
        "host_restored_tokens": counters.host_restored_blocks * layout.block_tokens,
    }
    if disk is not None:
        gauges |= {
            "disk_blocks": len(disk),
            "disk_bytes": len(disk) * disk.files.slot_bytes,
            "disk_restored_tokens": counters.disk_restored_blocks * layout.block_tokens,
            "corrupt_blocks": disk.corrupt_blocks,
            "tier_errors": disk.errors,
            "tier_off_reason": disk.off_reason,
        }
    return gauges
