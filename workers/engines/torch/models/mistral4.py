"""The decoder of the Mistral Small 4 shape: latent attention, a mixture of experts, a query scale that grows with position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.attention.interface import Attention
from workers.engines.torch.config import Mistral4Config
from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.mlp import mlp
from workers.engines.torch.layers.moe import MoeRule, MoeWeights, moe
from workers.engines.torch.layers.norm import rms_norm
from workers.engines.torch.layers.rope import RopeTables, inverse_frequencies, query_scale, rope_tables, rotate
from workers.engines.torch.models.decoder import logits_of
from workers.engines.torch.models.mistral4_weights import LatentAttention, Mistral4Weights
from workers.engines.torch.ranks import Ranks

_LATENT_NORM_EPS = 1e-6  # of the norms inside the attention; the configuration has no key for it


class Mistral4Decoder:
    """Embedding, layers, final norm, head, on one rank of an instance."""

    def __init__(self, config: Mistral4Config, weights: Mistral4Weights, attention: Attention, ranks: Ranks) -> None:
        self._config = config
        self._weights = weights
        self._attention = attention
        self._ranks = ranks
        self._rule = MoeRule(
            config.num_experts_per_token,
            config.norm_topk_prob,
            config.routed_scaling_factor,
            config.num_expert_groups,
            config.num_groups_per_token,
        )
        self._inverse_frequencies = inverse_frequencies(config.rope).to(weights.embedding.device)

    def expert_visits(self) -> tuple[int, ...]:
        """See Decoder.expert_visits."""
        return self._weights.expert_visits()

    def forward(self, batch: ForwardBatch, cache: KvCache) -> Tensor:
        """See Decoder.forward."""
        config, ranks = self._config, self._ranks
        eps = config.rms_norm_eps
        x = F.embedding(batch.token_ids, self._weights.embedding)
        tables = rope_tables(config.rope, self._inverse_frequencies, batch.positions, x.dtype)
        scale = query_scale(batch.positions, config.query_scale_beta, config.query_scale_positions, x.dtype)
        for index, layer in enumerate(self._weights.layers):
            q, rows = self._project(rms_norm(x, layer.input_norm, eps), layer.attention, tables)
            cache.store(index, batch.slots, rows)
            q = q if scale is None else q * scale
            attended = self._attention.mla(q, index, cache, batch, layer.attention.heads)
            x = x + ranks.sum(layer.attention.output(attended))
            normed, feed = rms_norm(x, layer.post_norm, eps), layer.feed_forward
            x = x + ranks.sum(moe(normed, feed, self._rule) if isinstance(feed, MoeWeights) else mlp(normed, feed))
        return logits_of(x, batch, self._weights.norm, eps, self._weights.head, ranks)

    def _project(self, x: Tensor, weights: LatentAttention, tables: RopeTables) -> tuple[Tensor, Tensor]:
        """Rotated queries [T, N, O + P] and the KV rows [T, R + P] of a batch."""
        config = self._config
        down = weights.q_kv_a(x)
        widths = [down.shape[1] - config.kv_row_values, config.kv_lora_rank, config.qk_rope_head_dim]
        q, latent, shared_key = torch.split(down, widths, dim=1)
        if weights.query is not None:
            q = weights.query.up(rms_norm(q, weights.query.norm, _LATENT_NORM_EPS))
        q = q.view(x.shape[0], config.num_heads // self._ranks.size, -1)
        q_nope, q_rope = q[..., : config.qk_nope_head_dim], q[..., config.qk_nope_head_dim :]
        latent = rms_norm(latent, weights.kv_a_norm, _LATENT_NORM_EPS)
        rotated_key = rotate(shared_key[:, None, :], tables)[:, 0]
        return torch.cat((q_nope, rotate(q_rope, tables)), dim=-1), torch.cat((latent, rotated_key), dim=-1)
