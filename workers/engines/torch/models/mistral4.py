"""The decoder of the Mistral Small 4 shape: latent attention, a mixture of experts, a query scale that grows with position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.config import Mistral4Config
from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.mla import LatentHeads, attend
from workers.engines.torch.layers.mlp import MlpWeights, mlp
from workers.engines.torch.layers.moe import MoeRule, MoeWeights, moe
from workers.engines.torch.layers.norm import rms_norm
from workers.engines.torch.layers.rope import RopeTables, inverse_frequencies, query_scale, rope_tables, rotate
from workers.engines.torch.weights import Checkpoint, Shapes

_LATENT_NORM_EPS = 1e-6  # of the norms inside the attention; the configuration has no key for it


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The weights of one attention; the two projections of the hidden row are fused by rows."""

    q_kv_a: Tensor
    q_a_norm: Tensor
    q_b: Tensor
    kv_a_norm: Tensor
    heads: LatentHeads
    output: Tensor


@dataclass(frozen=True, slots=True)
class Mistral4Layer:
    """The weights of one layer."""

    input_norm: Tensor
    attention: LatentAttention
    post_norm: Tensor
    feed_forward: MoeWeights | MlpWeights


class Mistral4Decoder:
    """Embedding, layers, final norm, head."""

    def __init__(self, config: Mistral4Config, checkpoint: Checkpoint) -> None:
        self._config = config
        self._rule = MoeRule(config.num_experts_per_token, config.norm_topk_prob, config.routed_scaling_factor)
        self._embedding = checkpoint.take("model.embed_tokens.weight")
        self._layers = [_load_layer(config, checkpoint, layer) for layer in range(config.num_layers)]
        self._norm = checkpoint.take("model.norm.weight")
        self._head = self._embedding if config.tie_word_embeddings else checkpoint.take("lm_head.weight")
        self._inverse_frequencies = inverse_frequencies(config.rope).to(self._embedding.device)

    @staticmethod
    def shapes(config: Mistral4Config) -> Shapes:
        """Every tensor that the checkpoint must hold."""
        hidden = config.hidden_size
        shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
        if not config.tie_word_embeddings:
            shapes["lm_head.weight"] = (config.vocab_size, hidden)
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
            shapes |= _attention_shapes(config, prefix + "self_attn.")
            shapes |= _feed_forward_shapes(config, prefix + "mlp.", dense=layer < config.num_dense_layers)
        return shapes

    def forward(self, batch: ForwardBatch, cache: KvCache) -> Tensor:
        """See Decoder.forward."""
        config = self._config
        eps = config.rms_norm_eps
        x = F.embedding(batch.token_ids, self._embedding)
        tables = rope_tables(config.rope, self._inverse_frequencies, batch.positions, x.dtype)
        scale = query_scale(batch.positions, config.query_scale_beta, config.query_scale_positions, x.dtype)
        for index, layer in enumerate(self._layers):
            normed = rms_norm(x, layer.input_norm, eps)
            q, rows = self._project(normed, layer.attention, tables)
            cache.store(index, batch.slots, rows)
            q = q if scale is None else q * scale
            x = x + F.linear(attend(q, index, cache, batch, layer.attention.heads), layer.attention.output)
            normed = rms_norm(x, layer.post_norm, eps)
            feed = layer.feed_forward
            x = x + (moe(normed, feed, self._rule) if isinstance(feed, MoeWeights) else mlp(normed, feed))
        last = rms_norm(x.index_select(0, batch.sample_rows), self._norm, eps)
        return F.linear(last, self._head).float()

    def _project(self, x: Tensor, weights: LatentAttention, tables: RopeTables) -> tuple[Tensor, Tensor]:
        """Rotated queries [T, N, O + P] and the KV rows [T, R + P] of a batch."""
        config = self._config
        rank_end = config.q_lora_rank + config.kv_lora_rank
        down = F.linear(x, weights.q_kv_a)
        q_latent, latent, shared_key = down[:, : config.q_lora_rank], down[:, config.q_lora_rank : rank_end], down[:, rank_end:]
        q = F.linear(rms_norm(q_latent, weights.q_a_norm, _LATENT_NORM_EPS), weights.q_b).view(x.shape[0], config.num_heads, -1)
        q_nope, q_rope = q[..., : config.qk_nope_head_dim], q[..., config.qk_nope_head_dim :]
        latent = rms_norm(latent, weights.kv_a_norm, _LATENT_NORM_EPS)
        rotated_key = rotate(shared_key[:, None, :], tables)[:, 0]
        return torch.cat((q_nope, rotate(q_rope, tables)), dim=-1), torch.cat((latent, rotated_key), dim=-1)


def _attention_shapes(config: Mistral4Config, prefix: str) -> Shapes:
    hidden, heads = config.hidden_size, config.num_heads
    return {
        prefix + "q_a_proj.weight": (config.q_lora_rank, hidden),
        prefix + "q_a_layernorm.weight": (config.q_lora_rank,),
        prefix + "q_b_proj.weight": (heads * config.qk_head_dim, config.q_lora_rank),
        prefix + "kv_a_proj_with_mqa.weight": (config.kv_row_values, hidden),
        prefix + "kv_a_layernorm.weight": (config.kv_lora_rank,),
        prefix + "kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        prefix + "o_proj.weight": (hidden, heads * config.v_head_dim),
    }


def _feed_forward_shapes(config: Mistral4Config, prefix: str, *, dense: bool) -> Shapes:
    hidden, experts, inner = config.hidden_size, config.num_experts, config.moe_intermediate_size
    if dense:
        return _mlp_shapes(prefix, hidden, config.intermediate_size)
    return {
        prefix + "gate.weight": (experts, hidden),
        prefix + "experts.gate_up_proj": (experts, 2 * inner, hidden),
        prefix + "experts.down_proj": (experts, hidden, inner),
        **_mlp_shapes(prefix + "shared_experts.", hidden, inner * config.num_shared_experts),
    }


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        prefix + "gate_proj.weight": (inner, hidden),
        prefix + "up_proj.weight": (inner, hidden),
        prefix + "down_proj.weight": (hidden, inner),
    }


def _load_layer(config: Mistral4Config, checkpoint: Checkpoint, index: int) -> Mistral4Layer:
    take, prefix = checkpoint.take, f"model.layers.{index}."
    attention, feed = prefix + "self_attn.", prefix + "mlp."
    feed_forward: MoeWeights | MlpWeights
    if index < config.num_dense_layers:
        feed_forward = _load_mlp(checkpoint, feed)
    else:
        feed_forward = MoeWeights(
            router=take(feed + "gate.weight"),
            gate_up=take(feed + "experts.gate_up_proj"),
            down=take(feed + "experts.down_proj"),
            shared=_load_mlp(checkpoint, feed + "shared_experts."),
        )
    return Mistral4Layer(
        input_norm=take(prefix + "input_layernorm.weight"),
        attention=LatentAttention(
            q_kv_a=torch.cat([take(attention + "q_a_proj.weight"), take(attention + "kv_a_proj_with_mqa.weight")]),
            q_a_norm=take(attention + "q_a_layernorm.weight"),
            q_b=take(attention + "q_b_proj.weight"),
            kv_a_norm=take(attention + "kv_a_layernorm.weight"),
            heads=LatentHeads.split(take(attention + "kv_b_proj.weight"), config.num_heads, config.qk_nope_head_dim),
            output=take(attention + "o_proj.weight"),
        ),
        post_norm=take(prefix + "post_attention_layernorm.weight"),
        feed_forward=feed_forward,
    )


def _load_mlp(checkpoint: Checkpoint, prefix: str) -> MlpWeights:
    names = (prefix + "gate_proj.weight", prefix + "up_proj.weight")
    return MlpWeights(
        gate_up=torch.cat([checkpoint.take(name) for name in names]),
        down=checkpoint.take(prefix + "down_proj.weight"),
    )
