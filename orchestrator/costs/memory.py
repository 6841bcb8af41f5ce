"""How many tokens and requests fit beside the weights."""

from __future__ import annotations

from configs.schema.hardware import Hardware
from configs.schema.model_description import ModelDescription
from orchestrator.costs import sizes
from orchestrator.costs.layout import Layout
from orchestrator.costs.shape import RankShape

USED_SHARE = 0.90  # of the memory: what engines take by default
WORKSPACE_BYTES = 3e9  # activations, graphs and buffers of an engine; less on small GPUs, whose steps are smaller
WORKSPACE_SHARE = 0.05


def cache_bytes(shape: RankShape, gpu: Hardware) -> float:
    """Bytes of one GPU that are left for the cache; 0 when the weights do not fit."""
    memory = gpu.peaks.memory_gib.value * 2.0**30
    workspace = min(WORKSPACE_BYTES, WORKSPACE_SHARE * memory)
    return max(0.0, memory * USED_SHARE - float(shape.weight_bytes) - workspace)


def request_bytes(model: ModelDescription, layout: Layout, tokens: int) -> float:
    """Bytes on one GPU of a request of so many tokens."""
    rows = 0.0
    for blocks in model.blocks:
        split = layout.tensor
        heads = getattr(blocks.mixer, "kv_heads", None)
        split = 1 if heads is None else min(layout.tensor, heads)
        rows += blocks.count * sizes.block_kv_bytes(blocks, tokens, layout.kv) / split
    return rows + sizes.state_bytes(model) / layout.tensor


def places(model: ModelDescription, layout: Layout, shape: RankShape, gpu: Hardware, tokens: int) -> float:
    """Requests of so many tokens that one data-parallel group holds at a time; below 1 when not even one fits."""
    return cache_bytes(shape, gpu) / request_bytes(model, layout, tokens)
