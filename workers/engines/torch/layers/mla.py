"""Multi-head latent attention over paged rows. A KV row is `[latent (R) | rotated key (P)]`, shared by all heads.

Two forms of one attention. Expanded: keys and values of every head are rebuilt from the latents; cheaper for the many
query rows of a prompt. Absorbed: the rebuilding matrices move to the query and to the output, and all heads attend to
the latents themselves; cheaper for few query rows. q: [T, N, O + P] (unrotated part first). Memory is bounded by a tile
of context, whatever the context is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.forward_batch import DecodeGroup, ForwardBatch, PrefillPart
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.masks import decode_tiles, tile_rows
from workers.engines.torch.layers.partial import Merged, attend_part, attend_plainly
from workers.engines.torch.layers.tiles import KeyTile, TileSizes, key_tiles, row_runs


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """The matrices that rebuild keys and values of each head from a latent, views of one checkpoint tensor."""

    joint: Tensor  # [N * (O + V), R], as stored
    key: Tensor  # [N, O, R]
    value: Tensor  # [N, V, R]

    @classmethod
    def split(cls, joint: Tensor, num_heads: int, nope_dim: int) -> LatentHeads:
        """Views of `kv_b_proj`: per head first the key rows, then the value rows."""
        per_head = joint.view(num_heads, -1, joint.shape[-1])
        return cls(joint, per_head[:, :nope_dim], per_head[:, nope_dim:])


def attend(q: Tensor, layer: int, cache: KvCache, batch: ForwardBatch, heads: LatentHeads, sizes: TileSizes) -> Tensor:
    """Attention output of all rows, [T, N * V]. The rows of this batch are in the cache already."""
    num_heads, value_dim, _ = heads.value.shape
    out = q.new_empty(q.shape[0], num_heads, value_dim)
    for part in batch.prefills:
        mine = slice(part.first, part.first + part.count)
        few = part.count <= sizes.query_rows and absorbed_is_cheaper(part.count, part.start + part.count, q.shape[-1], heads)
        form = absorbed if few else expanded
        out[mine] = form(q[mine], _tiles_of(layer, cache, part, sizes), part.start, heads, sizes)
    if batch.decodes is not None:
        for group in batch.decodes.groups:
            rows = slice(0, batch.decodes.count) if group.rows is None else group.rows
            out[rows] = _decode(q[rows], layer, cache, group, heads, sizes)
    return out.flatten(1)


def absorbed_is_cheaper(count: int, context: int, query_dim: int, heads: LatentHeads) -> bool:
    """Compares the multiplications per head of `count` rows over `context` keys.

    Expanded: context * R * (O + V) to rebuild, count * context * (O + P + V) to attend. Absorbed:
    count * R * (O + V) to move the matrices, count * context * (2 R + P) to attend. With the dimensions of Mistral
    Small 4 over a long context the absorbed form is cheaper up to 153 rows.
    """
    _, nope_dim, rank = heads.key.shape
    value_dim = heads.value.shape[1]
    rebuild = rank * (nope_dim + value_dim)
    in_heads = context * rebuild + count * context * (query_dim + value_dim)
    in_latents = count * rebuild + count * context * (2 * rank + query_dim - nope_dim)
    return in_latents < in_heads


def _tiles_of(layer: int, cache: KvCache, part: PrefillPart, sizes: TileSizes) -> Iterator[tuple[KeyTile, Tensor]]:
    for tile in key_tiles(part.start, part.count, None, sizes):
        yield tile, tile_rows(cache, layer, part, tile)


def expanded(q: Tensor, tiles: Iterator[tuple[KeyTile, Tensor]], start: int, heads: LatentHeads, sizes: TileSizes) -> Tensor:
    """Attention of a chunk of one sequence, [count, N, V], over keys and values rebuilt from its latents, one tile at a time.

    tiles: positions and rows [keys, R + P] of all that the chunk sees.
    """
    num_heads, nope_dim, rank = heads.key.shape
    count, query, merged = q.shape[0], q.transpose(0, 1)[None], Merged(q.shape[0])
    for tile, rows in tiles:
        rebuilt = F.linear(rows[:, :rank], heads.joint).view(rows.shape[0], num_heads, -1)
        shared = rows[:, None, rank:].expand(-1, num_heads, -1)
        keys = torch.cat((rebuilt[..., :nope_dim], shared), dim=-1).transpose(0, 1)[None]
        values = rebuilt[..., nope_dim:].transpose(0, 1)[None]
        for run in row_runs(tile, start, count, None, sizes):
            mine = query[:, :, run.first - start : run.end - start]
            found = attend_part(mine, keys, values, q.shape[-1] ** -0.5, causal=run.sight == "causal")
            merged.add(found, run.first - start)
    return merged.result(q.dtype)[0].transpose(0, 1)


def absorbed(q: Tensor, tiles: Iterator[tuple[KeyTile, Tensor]], start: int, heads: LatentHeads, sizes: TileSizes) -> Tensor:
    """The same over the latents themselves: every head of every row is a query of one wide head."""
    count, num_heads, _ = q.shape
    rank = heads.key.shape[2]
    query, merged = _into_latents(q, heads).flatten(0, 1)[None, None], Merged(count * num_heads)
    for tile, rows in tiles:
        keys = rows[None, None]
        for run in row_runs(tile, start, count, None, sizes):
            first, end = (run.first - start) * num_heads, (run.end - start) * num_heads
            mask = None
            if run.sight == "causal":
                mask = torch.ones(run.end - run.first, len(rows), dtype=torch.bool, device=q.device).tril_()
                mask = mask.repeat_interleave(num_heads, dim=0)
            found = attend_part(query[:, :, first:end], keys, keys[..., :rank], q.shape[-1] ** -0.5, mask=mask)
            merged.add(found, first)
    return _out_of_latents(merged.result(q.dtype).view(count, num_heads, rank), heads)


def _decode(q: Tensor, layer: int, cache: KvCache, group: DecodeGroup, heads: LatentHeads, sizes: TileSizes) -> Tensor:
    """One row of each of b sequences, [b, N, V], in the absorbed form."""
    rank = heads.key.shape[2]
    query, merged = _into_latents(q, heads)[:, None], Merged(q.shape[1])
    for rows, mask in decode_tiles(cache, layer, group, None, sizes):
        keys = rows[:, None]
        seen = None if mask is None else mask[:, None, None, :]
        merged.add(attend_plainly(query, keys, keys[..., :rank], q.shape[-1] ** -0.5, seen))
    return _out_of_latents(merged.result(q.dtype)[:, 0], heads)


def _into_latents(q: Tensor, heads: LatentHeads) -> Tensor:
    """Queries against a KV row, [T, N, R + P]."""
    nope_dim = heads.key.shape[1]
    latent = torch.bmm(q[..., :nope_dim].transpose(0, 1), heads.key).transpose(0, 1)
    return torch.cat((latent, q[..., nope_dim:]), dim=-1)


def _out_of_latents(mixed: Tensor, heads: LatentHeads) -> Tensor:
    """[T, N, R] to [T, N, V]."""
    return torch.bmm(mixed.transpose(0, 1), heads.value.transpose(1, 2)).transpose(0, 1)
