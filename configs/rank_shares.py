"""Whether the ranks of a pool can share a model: said of the cluster file, before any process loads a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.model_card import read_text_config
from configs.schema.pools import PoolConfig
from protos.contract.errors import ConfigError

_MOST_RANKS = 64


def check_ranks(pools: Sequence[PoolConfig], model_dir: Path) -> None:
    """Raises ConfigError, a line for each pool whose ranks cannot share the model, and ModelError for an unreadable one.

    Ranks must divide heads, experts, widths and vocabulary; of KV heads either number may divide the other.
    """
    several = [(index, pool) for index, pool in enumerate(pools) if pool.ranks > 1 and pool.engine.kind == "torch"]
    if not several:
        return
    architecture, text = read_text_config(model_dir)
    counts = _counts(architecture, text)
    kv_heads = text.get("num_key_value_heads") if architecture != "mistral4" else None
    possible = [ranks for ranks in range(1, _MOST_RANKS + 1) if not _at_fault(counts, kv_heads, ranks)]
    lines = []
    for index, pool in several:
        fault = _at_fault(counts, kv_heads, pool.ranks)
        if fault:
            choice = ", ".join(map(str, possible))
            lines.append(f"pools[{index}].ranks: {pool.ranks} ranks cannot share {fault} of {model_dir}; {choice} can")
    if lines:
        raise ConfigError("\n".join(lines))


def _counts(architecture: str, text: Mapping[str, Any]) -> dict[str, int]:
    """What is shared out, by its key."""
    keys = ["num_attention_heads", "vocab_size"]
    if architecture == "mistral4":
        keys += ["n_routed_experts", "moe_intermediate_size"]
    if architecture != "mistral4" or text.get("first_k_dense_replace"):
        keys.append("intermediate_size")
    counts = {key: text[key] for key in keys if isinstance(text.get(key), int)}
    if "moe_intermediate_size" in counts:
        counts["moe_intermediate_size"] *= int(text.get("n_shared_experts") or 1)
    return counts


def _at_fault(counts: Mapping[str, int], kv_heads: object, ranks: int) -> str:
    """The first count that so many ranks cannot share, with its key; empty when there is none."""
    for key, count in counts.items():
        if count % ranks:
            return f"{key} {count}"
    if isinstance(kv_heads, int) and kv_heads % ranks and ranks % kv_heads:
        return f"num_key_value_heads {kv_heads}"
    return ""
