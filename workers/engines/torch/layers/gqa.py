"""Grouped-query attention over paged rows. A KV row is `[k of all KV heads | v of all KV heads]`, keys rotated.

q: [T, N, D]; G = N / K query heads share each of the K KV heads, which is the batch dimension of the kernels, so
neither keys nor values are repeated in memory. Memory is bounded by a tile of context, whatever the context is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engines.torch.forward_batch import DecodeGroup, ForwardBatch, PrefillPart
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.masks import decode_tiles, tile_rows, window_mask
from workers.engines.torch.layers.partial import Merged, attend_part, attend_plainly
from workers.engines.torch.layers.tiles import TileSizes, key_tiles, row_runs


def attend(
    q: Tensor, layer: int, cache: KvCache, batch: ForwardBatch, num_kv_heads: int, window: int | None, sizes: TileSizes
) -> Tensor:
    """Attention output of all rows, [T, N * D]. The rows of this batch are in the cache already."""
    out = torch.empty_like(q)
    for part in batch.prefills:
        rows = slice(part.first, part.first + part.count)
        out[rows] = _prefill(q[rows], layer, cache, part, num_kv_heads, window, sizes)
    if batch.decodes is not None:
        for group in batch.decodes.groups:
            mine = slice(0, batch.decodes.count) if group.rows is None else group.rows
            out[mine] = _decode(q[mine], layer, cache, group, num_kv_heads, window, sizes)
    return out.flatten(1)


def _prefill(
    q: Tensor, layer: int, cache: KvCache, part: PrefillPart, num_kv_heads: int, window: int | None, sizes: TileSizes
) -> Tensor:
    count, num_heads, dim = q.shape
    grouped = q.view(count, num_kv_heads, num_heads // num_kv_heads, dim).permute(1, 2, 0, 3)
    merged = Merged(count)
    for tile in key_tiles(part.start, count, window, sizes):
        rows = tile_rows(cache, layer, part, tile).view(-1, 2, num_kv_heads, 1, dim)
        keys, values = rows.permute(1, 2, 3, 0, 4).unbind(0)
        for run in row_runs(tile, part.start, count, window, sizes):
            mask = window_mask(run, tile, window, q.device) if window is not None and run.sight == "masked" else None
            query = grouped[:, :, run.first - part.start : run.end - part.start]
            found = attend_part(query, keys, values, dim**-0.5, causal=run.sight == "causal", mask=mask)
            merged.add(found, run.first - part.start)
    return merged.result(q.dtype).permute(2, 0, 1, 3).reshape(count, num_heads, dim)


def _decode(
    q: Tensor, layer: int, cache: KvCache, group: DecodeGroup, num_kv_heads: int, window: int | None, sizes: TileSizes
) -> Tensor:
    size, num_heads, dim = q.shape
    # The query heads of a group are rows of one small matrix.
    grouped = q.view(size, num_kv_heads, num_heads // num_kv_heads, dim)
    merged = Merged(grouped.shape[2])
    for rows, mask in decode_tiles(cache, layer, group, window, sizes):
        keys, values = rows.view(size, -1, 2, num_kv_heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
        seen = None if mask is None else mask[:, None, None, :]
        merged.add(attend_plainly(grouped, keys, values, dim**-0.5, seen))
    return merged.result(q.dtype).reshape(size, num_heads, dim)
