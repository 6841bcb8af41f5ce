"""The decoder of the Llama and Mistral shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.attention.interface import Attention
from workers.engines.torch.config import DenseConfig
from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.mlp import mlp
from workers.engines.torch.layers.norm import rms_norm
from workers.engines.torch.layers.rope import inverse_frequencies, query_scale, rope_tables, rotate
from workers.engines.torch.models.decoder import logits_of
from workers.engines.torch.models.dense_weights import DenseWeights
from workers.engines.torch.ranks import Ranks, kv_head_share


class DenseDecoder:
    """Embedding, layers, final norm, head, on one rank of an instance."""

    def __init__(self, config: DenseConfig, weights: DenseWeights, attention: Attention, ranks: Ranks) -> None:
        self._config = config
        self._weights = weights
        self._attention = attention
        self._ranks = ranks
        held = kv_head_share(config.num_kv_heads, ranks)
        self._num_kv_heads = held.stop - held.start
        self._inverse_frequencies = inverse_frequencies(config.rope).to(weights.embedding.device)

    def expert_visits(self) -> tuple[int, ...]:
        """See Decoder.expert_visits."""
        return ()

    def forward(self, batch: ForwardBatch, cache: KvCache) -> Tensor:
        """See Decoder.forward."""
        config, ranks = self._config, self._ranks
        eps, dim = config.rms_norm_eps, config.head_dim
        heads, kv_heads = config.num_heads // ranks.size, self._num_kv_heads
        x = F.embedding(batch.token_ids, self._weights.embedding)
        tables = rope_tables(config.rope, self._inverse_frequencies, batch.positions, x.dtype)
        scale = query_scale(batch.positions, config.query_scale_beta, config.query_scale_positions, x.dtype)
        for index, layer in enumerate(self._weights.layers):
            qkv = layer.qkv(rms_norm(x, layer.input_norm, eps)).view(x.shape[0], -1, dim)
            turned = rotate(qkv[:, : heads + kv_heads], tables)
            q, k, v = turned[:, :heads], turned[:, heads:], qkv[:, heads + kv_heads :]
            cache.store(index, batch.slots, torch.cat((k, v), dim=1).flatten(1))
            q = q if scale is None else q * scale
            attended = self._attention.gqa(q, index, cache, batch, kv_heads, config.window_of(index))
            x = x + ranks.sum(layer.output(attended))
            x = x + ranks.sum(mlp(rms_norm(x, layer.post_norm, eps), layer.mlp))
        return logits_of(x, batch, self._weights.norm, eps, self._weights.head, ranks)
