"""Which keys a row may see, and the rows of the pool tile by tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from workers.engines.torch.forward_batch import DecodeGroup, PrefillPart
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.tiles import KeyTile, RowRun, TileSizes


def window_mask(run: RowRun, tile: KeyTile, window: int, device: torch.device) -> Tensor:
    """[rows, keys], true where the key lies in the row's window."""
    rows = torch.arange(run.first, run.end, device=device)[:, None]
    keys = torch.arange(tile.first, tile.end, device=device)
    return (keys <= rows) & (keys > rows - window)


def tile_rows(cache: KvCache, layer: int, part: PrefillPart, tile: KeyTile) -> Tensor:
    """The KV rows of a tile of one sequence, [keys, row]: a copy of those blocks and no more."""
    tokens = cache.layout.block_tokens
    first_block = tile.first // tokens
    rows = cache.load(layer, part.block_table[first_block : cache.blocks_for(tile.end)]).flatten(0, 1)
    return rows[tile.first - first_block * tokens : tile.end - first_block * tokens]


def decode_tiles(
    cache: KvCache, layer: int, group: DecodeGroup, window: int | None, sizes: TileSizes
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The KV rows of b sequences, tile by tile, [b, L, row], and the mask [b, L] of those that are seen; None when all are.

    Rows behind a sequence's end hold whatever was in the block before: they come as zeros, because a NaN there would
    pass through a weight of zero.
    """
    tokens = cache.layout.block_tokens
    tables, first_blocks = group.block_tables, None
    if window is not None and not sizes.fixed and cache.blocks_for(window) + 1 < tables.shape[1]:
        # Every sequence has its own window: its blocks, at most that many.
        first_blocks = (group.lengths - window).clamp_min(0).div(tokens, rounding_mode="floor")[:, None]
        inside = first_blocks + torch.arange(cache.blocks_for(window) + 1, device=tables.device)
        tables = tables.gather(1, inside.clamp_max(tables.shape[1] - 1).long())
    step = max(1, sizes.context_tokens // tokens)
    for first in range(0, tables.shape[1], step):
        blocks = tables[:, first : first + step]
        if sizes.fixed and window is not None and (first + step) * tokens <= group.shortest - window:
            continue
        rows = cache.load(layer, blocks.flatten()).view(blocks.shape[0], blocks.shape[1] * tokens, -1)
        if window is None and (first + blocks.shape[1]) * tokens <= group.shortest:
            yield rows, None
            continue
        positions = torch.arange(first * tokens, (first + blocks.shape[1]) * tokens, device=rows.device)
        if first_blocks is not None:
            positions = positions + first_blocks * tokens
        seen = positions < group.lengths[:, None]
        rows = rows.masked_fill_(~seen[..., None], 0)
        yield rows, seen if window is None else seen & (positions >= group.lengths[:, None] - window)
