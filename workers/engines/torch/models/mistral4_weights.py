"""The weights of the Mistral Small 4 shape: what a checkpoint must hold, and which share of it a rank keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engines.torch.config import Mistral4Config
from workers.engines.torch.layers.linear import Linear
from workers.engines.torch.layers.mla import LatentHeads
from workers.engines.torch.layers.mlp import MlpWeights
from workers.engines.torch.layers.moe import MoeWeights
from workers.engines.torch.models.dense_weights import load_mlp
from workers.engines.torch.ranks import Ranks, share
from workers.engines.torch.weights import WHOLE, Checkpoint, Shapes


@dataclass(frozen=True, slots=True)
class LatentQuery:
    """From the latent of the queries to the queries of a run of heads."""

    norm: Tensor
    up: Linear


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The weights of one attention; the two projections of the hidden row are fused by rows.

    Without a latent of the queries, the first of them makes the queries themselves.

    A rank holds a run of the heads; the latent row, and so the KV cache, is the same on every rank.
    """

    q_kv_a: Linear
    query: LatentQuery | None
    kv_a_norm: Tensor
    heads: LatentHeads
    output: Linear


@dataclass(frozen=True, slots=True)
class Mistral4Layer:
    """The weights of one layer; a rank holds a run of the experts and of the shared expert's width."""

    input_norm: Tensor
    attention: LatentAttention
    post_norm: Tensor
    feed_forward: MoeWeights | MlpWeights


@dataclass(frozen=True, slots=True)
class Mistral4Weights:
    """The weights of one rank; the head holds a run of the vocabulary."""

    embedding: Tensor
    layers: tuple[Mistral4Layer, ...]
    norm: Tensor
    head: Linear

    def expert_visits(self) -> tuple[int, ...]:
        """Rows that each expert was chosen for since the start, over all layers."""
        counts = [feed.visits for layer in self.layers if isinstance(feed := layer.feed_forward, MoeWeights)]
        kept = [count for count in counts if count is not None]
        return tuple(torch.stack(kept).sum(0).tolist()) if kept else ()


def mistral4_shapes(config: Mistral4Config) -> Shapes:
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


def _attention_shapes(config: Mistral4Config, prefix: str) -> Shapes:
    hidden, heads, rank = config.hidden_size, config.num_heads, config.q_lora_rank
    shapes: Shapes = {}
    if rank is None:
        shapes[prefix + "q_proj.weight"] = (heads * config.qk_head_dim, hidden)
    else:
        shapes[prefix + "q_a_proj.weight"] = (rank, hidden)
        shapes[prefix + "q_a_layernorm.weight"] = (rank,)
        shapes[prefix + "q_b_proj.weight"] = (heads * config.qk_head_dim, rank)
    return shapes | {
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


def load_mistral4(config: Mistral4Config, checkpoint: Checkpoint, ranks: Ranks) -> Mistral4Weights:
    """This rank's share. Raises ModelError when heads, experts or widths cannot be shared equally."""
    embedding = checkpoint.take("model.embed_tokens.weight")
    layers = tuple(_load_layer(config, checkpoint, ranks, layer) for layer in range(config.num_layers))
    norm = checkpoint.take("model.norm.weight")
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    head = checkpoint.linear(name, rows=share(config.vocab_size, ranks, "vocab_size"))
    return Mistral4Weights(embedding, layers, norm, head)


def _load_layer(config: Mistral4Config, checkpoint: Checkpoint, ranks: Ranks, index: int) -> Mistral4Layer:
    take, prefix = checkpoint.take, f"model.layers.{index}."
    return Mistral4Layer(
        input_norm=take(prefix + "input_layernorm.weight"),
        attention=_load_attention(config, checkpoint, ranks, prefix + "self_attn."),
        post_norm=take(prefix + "post_attention_layernorm.weight"),
        feed_forward=_load_feed_forward(config, checkpoint, ranks, prefix + "mlp.", dense=index < config.num_dense_layers),
    )


def _load_attention(config: Mistral4Config, checkpoint: Checkpoint, ranks: Ranks, prefix: str) -> LatentAttention:
    take, heads = checkpoint.take, config.num_heads
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    joint = take(prefix + "kv_b_proj.weight", share(heads, ranks, "num_attention_heads", each=nope + value))
    queries = share(heads, ranks, "num_attention_heads", each=config.qk_head_dim)
    query, down = None, (prefix + "q_proj.weight", queries)
    if config.q_lora_rank is not None:
        query = LatentQuery(take(prefix + "q_a_layernorm.weight"), checkpoint.linear(prefix + "q_b_proj.weight", rows=queries))
        down = (prefix + "q_a_proj.weight", WHOLE)
    return LatentAttention(
        q_kv_a=checkpoint.fused([down, (prefix + "kv_a_proj_with_mqa.weight", WHOLE)]),
        query=query,
        kv_a_norm=take(prefix + "kv_a_layernorm.weight"),
        heads=LatentHeads.split(joint, heads // ranks.size, nope),
        output=checkpoint.linear(prefix + "o_proj.weight", columns=share(heads, ranks, "num_attention_heads", each=value)),
    )


def _load_feed_forward(
    config: Mistral4Config, checkpoint: Checkpoint, ranks: Ranks, prefix: str, *, dense: bool
) -> MoeWeights | MlpWeights:
    if dense:
        return load_mlp(checkpoint, prefix, share(config.intermediate_size, ranks, "intermediate_size"))
    shared = share(config.moe_intermediate_size * config.num_shared_experts, ranks, "moe_intermediate_size")
    router = checkpoint.take(prefix + "gate.weight")
    return MoeWeights(
        router=router,
        experts=checkpoint.experts(prefix + "experts.", share(config.num_experts, ranks, "n_routed_experts")),
        shared=load_mlp(checkpoint, prefix + "shared_experts.", shared),
        visits=torch.zeros(config.num_experts, dtype=torch.int64, device=router.device),
    )
