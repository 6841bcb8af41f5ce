"""The weights of the Llama and Mistral shape: what a checkpoint must hold, and which share of it a rank keeps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.engines.torch.config import DenseConfig
from workers.engines.torch.layers.linear import Linear
from workers.engines.torch.layers.mlp import MlpWeights
from workers.engines.torch.ranks import Ranks, kv_head_share, share
from workers.engines.torch.weights import Checkpoint, Shapes


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """The weights of one layer; q, k and v are fused by rows. A rank holds a run of the heads and of the inner width."""

    input_norm: Tensor
    qkv: Linear
    output: Linear
    post_norm: Tensor
    mlp: MlpWeights


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """The weights of one rank; the head holds a run of the vocabulary."""

    embedding: Tensor
    layers: tuple[DenseLayer, ...]
    norm: Tensor
    head: Linear


def dense_shapes(config: DenseConfig) -> Shapes:
    """Every tensor that the checkpoint must hold."""
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (width, hidden),
            prefix + "self_attn.k_proj.weight": (kv_width, hidden),
            prefix + "self_attn.v_proj.weight": (kv_width, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, width),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
    return shapes


def load_dense(config: DenseConfig, checkpoint: Checkpoint, ranks: Ranks) -> DenseWeights:
    """This rank's share. Raises ModelError when the heads or widths cannot be shared equally."""
    embedding = checkpoint.take("model.embed_tokens.weight")
    layers = tuple(_load_layer(config, checkpoint, ranks, f"model.layers.{layer}.") for layer in range(config.num_layers))
    norm = checkpoint.take("model.norm.weight")
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return DenseWeights(embedding, layers, norm, checkpoint.linear(name, rows=share(config.vocab_size, ranks, "vocab_size")))


def _load_layer(config: DenseConfig, checkpoint: Checkpoint, ranks: Ranks, prefix: str) -> DenseLayer:
    attention, feed = prefix + "self_attn.", prefix + "mlp."
    heads = share(config.num_heads, ranks, "num_attention_heads", each=config.head_dim)
    held = kv_head_share(config.num_kv_heads, ranks)
    kv_heads = slice(held.start * config.head_dim, held.stop * config.head_dim)
    inner = share(config.intermediate_size, ranks, "intermediate_size")
    return DenseLayer(
        input_norm=checkpoint.take(prefix + "input_layernorm.weight"),
        qkv=checkpoint.fused(
            [(attention + "q_proj.weight", heads), *((f"{attention}{n}_proj.weight", kv_heads) for n in "kv")]
        ),
        output=checkpoint.linear(attention + "o_proj.weight", columns=heads),
        post_norm=checkpoint.take(prefix + "post_attention_layernorm.weight"),
        mlp=load_mlp(checkpoint, feed, inner),
    )


def load_mlp(checkpoint: Checkpoint, prefix: str, inner: slice) -> MlpWeights:
    """A gated feed-forward; of its inner width only this run."""
    return MlpWeights(
        gate_up=checkpoint.fused([(prefix + "gate_proj.weight", inner), (prefix + "up_proj.weight", inner)]),
        down=checkpoint.linear(prefix + "down_proj.weight", columns=inner),
    )
