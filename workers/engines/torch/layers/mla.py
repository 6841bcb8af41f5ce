"""Multi-head latent attention over paged rows. A KV row is `[latent (R) | rotated key (P)]`, shared by all heads.

Two forms of one attention. Expanded: keys and values of every head are rebuilt from the latents; cheaper for the many
query rows of a prompt. Absorbed: the rebuilding matrices move to the query and to the output, and all heads attend to
the latents themselves; cheaper for the single row of a decode step. q: [T, N, O + P] (unrotated part first).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.forward_batch import ForwardBatch, PrefillPart
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.masks import causal_mask, sequences


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


def attend(q: Tensor, layer: int, cache: KvCache, batch: ForwardBatch, heads: LatentHeads) -> Tensor:
    """Attention output of all rows, [T, N * V]. The rows of this batch are in the cache already."""
    num_heads, value_dim, _ = heads.value.shape
    out = q.new_empty(q.shape[0], num_heads, value_dim)
    for part in batch.prefills:
        rows = slice(part.first, part.first + part.count)
        context = cache.load(layer, part.block_table).flatten(0, 1)[: part.start + part.count]
        out[rows] = expanded(q[rows], context, part, heads)
    if batch.decodes is not None:
        group = batch.decodes
        context, mask = sequences(cache, layer, group)
        out[: group.count] = absorbed(q[: group.count], context, mask, heads)
    return out.flatten(1)


def expanded(q: Tensor, rows: Tensor, part: PrefillPart, heads: LatentHeads) -> Tensor:
    """Attention of a chunk of one sequence, [count, N, V], over keys and values rebuilt from its latents."""
    num_heads, nope_dim, rank = heads.key.shape
    latent, rotated = rows[:, :rank], rows[:, rank:]
    rebuilt = F.linear(latent, heads.joint).view(rows.shape[0], num_heads, -1)
    keys = torch.cat((rebuilt[..., :nope_dim], rotated[:, None, :].expand(-1, num_heads, -1)), dim=-1)
    values = rebuilt[..., nope_dim:]
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=causal_mask(part, q.device),
        is_causal=part.start == 0,
        scale=q.shape[-1] ** -0.5,
    )
    return out[0].transpose(0, 1)


def absorbed(q: Tensor, cached: Tensor, mask: Tensor, heads: LatentHeads) -> Tensor:
    """Attention of one row of each of B sequences, [B, N, V], over the latents themselves, [B, L, R + P].

    mask: [B, L], true where a key is real.
    """
    _, nope_dim, rank = heads.key.shape
    q_latent = torch.bmm(q[..., :nope_dim].transpose(0, 1), heads.key).transpose(0, 1)
    query = torch.cat((q_latent, q[..., nope_dim:]), dim=-1)
    scores = torch.matmul(query, cached.transpose(1, 2)).float() * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
    mixed = torch.matmul(scores.softmax(-1).to(cached.dtype), cached[..., :rank])
    return torch.bmm(mixed.transpose(0, 1), heads.value.transpose(1, 2)).transpose(0, 1)
