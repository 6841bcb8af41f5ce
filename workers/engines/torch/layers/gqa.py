"""Grouped-query attention over paged rows. A KV row is `[k of all KV heads | v of all KV heads]`, keys rotated.

q: [T, N, D]; G = N / K query heads share each of the K KV heads, which is the batch dimension of the kernels, so
neither keys nor values are repeated in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.forward_batch import ForwardBatch, PrefillPart
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.masks import causal_mask, sequences


def attend(q: Tensor, layer: int, cache: KvCache, batch: ForwardBatch, num_kv_heads: int) -> Tensor:
    """Attention output of all rows, [T, N * D]. The rows of this batch are in the cache already."""
    out = torch.empty_like(q)
    for part in batch.prefills:
        rows = slice(part.first, part.first + part.count)
        context = cache.load(layer, part.block_table).flatten(0, 1)[: part.start + part.count]
        out[rows] = _prefill(q[rows], context, part, num_kv_heads)
    if batch.decodes is not None:
        group = batch.decodes
        context, mask = sequences(cache, layer, group)
        out[: group.count] = _decode(q[: group.count], context, mask, num_kv_heads)
    return out.flatten(1)


def _prefill(q: Tensor, rows: Tensor, part: PrefillPart, num_kv_heads: int) -> Tensor:
    count, num_heads, dim = q.shape
    per_group = num_heads // num_kv_heads
    keys, values = rows.view(-1, 2, num_kv_heads, 1, dim).unbind(1)
    shape = (num_kv_heads, per_group, rows.shape[0], dim)
    out = F.scaled_dot_product_attention(
        q.view(count, num_kv_heads, per_group, dim).permute(1, 2, 0, 3),
        keys.permute(1, 2, 0, 3).expand(shape),
        values.permute(1, 2, 0, 3).expand(shape),
        attn_mask=causal_mask(part, q.device),
        is_causal=part.start == 0,
    )
    return out.permute(2, 0, 1, 3).reshape(count, num_heads, dim)


def _decode(q: Tensor, rows: Tensor, mask: Tensor, num_kv_heads: int) -> Tensor:
    size, num_heads, dim = q.shape
    keys, values = rows.view(size, -1, 2, num_kv_heads, dim).permute(2, 0, 3, 1, 4).unbind(0)
    # The query heads of a group are rows of one small matrix.
    grouped = q.view(size, num_kv_heads, num_heads // num_kv_heads, dim)
    attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask[:, None, None, :])
    return attended.reshape(size, num_heads, dim)
