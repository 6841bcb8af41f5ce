"""Which keys a row may see."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engines.torch.forward_batch import DecodePart, PrefillPart
from workers.engines.torch.kv_cache import KvCache


def causal_mask(part: PrefillPart, device: torch.device) -> Tensor | None:
    """[count, start + count], true where key position <= query position; None at the start of a sequence (plain causal)."""
    if part.start == 0:
        return None
    keys = torch.arange(part.start + part.count, device=device)
    return keys[None, :] <= keys[part.start :, None]


def sequences(cache: KvCache, layer: int, group: DecodePart) -> tuple[Tensor, Tensor]:
    """The rows of B sequences, [B, L, row], zero behind each one's end, and the mask [B, L] of those that are real.

    Rows behind the end hold whatever was in the block before; a NaN there would pass through a weight of zero.
    """
    tokens = cache.layout.block_tokens
    rows = cache.load(layer, group.block_tables.flatten()).view(group.count, group.block_tables.shape[1] * tokens, -1)
    mask = torch.arange(rows.shape[1], device=rows.device) < group.lengths[:, None]
    return rows.masked_fill_(~mask[..., None], 0), mask
