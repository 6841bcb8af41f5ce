"""The decoder of the Llama and Mistral shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.config import DenseConfig
from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.gqa import attend
from workers.engines.torch.layers.mlp import MlpWeights, mlp
from workers.engines.torch.layers.norm import rms_norm
from workers.engines.torch.layers.rope import inverse_frequencies, rope_tables, rotate
from workers.engines.torch.weights import Checkpoint, Shapes


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """The weights of one layer; q, k and v are fused by rows."""

    input_norm: Tensor
    qkv: Tensor
    output: Tensor
    post_norm: Tensor
    mlp: MlpWeights


class DenseDecoder:
    """Embedding, layers, final norm, head."""

    def __init__(self, config: DenseConfig, checkpoint: Checkpoint) -> None:
        self._config = config
        self._embedding = checkpoint.take("model.embed_tokens.weight")
        self._layers = [_load_layer(checkpoint, f"model.layers.{layer}.") for layer in range(config.num_layers)]
        self._norm = checkpoint.take("model.norm.weight")
        self._head = self._embedding if config.tie_word_embeddings else checkpoint.take("lm_head.weight")
        self._inverse_frequencies = inverse_frequencies(config.rope).to(self._embedding.device)

    @staticmethod
    def shapes(config: DenseConfig) -> Shapes:
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

    def forward(self, batch: ForwardBatch, cache: KvCache) -> Tensor:
        """See Decoder.forward."""
        config = self._config
        eps = config.rms_norm_eps
        x = F.embedding(batch.token_ids, self._embedding)
        tables = rope_tables(config.rope, self._inverse_frequencies, batch.positions, x.dtype)
        rotated_heads = config.num_heads + config.num_kv_heads
        for index, layer in enumerate(self._layers):
            qkv = F.linear(rms_norm(x, layer.input_norm, eps), layer.qkv).view(x.shape[0], -1, config.head_dim)
            turned = rotate(qkv[:, :rotated_heads], tables)
            q, k, v = turned[:, : config.num_heads], turned[:, config.num_heads :], qkv[:, rotated_heads:]
            cache.store(index, batch.slots, torch.cat((k, v), dim=1).flatten(1))
            x = x + F.linear(attend(q, index, cache, batch, config.num_kv_heads), layer.output)
            x = x + mlp(rms_norm(x, layer.post_norm, eps), layer.mlp)
        last = rms_norm(x.index_select(0, batch.sample_rows), self._norm, eps)
        return F.linear(last, self._head).float()


def _load_layer(checkpoint: Checkpoint, prefix: str) -> DenseLayer:
    take = checkpoint.take
    attention, feed = prefix + "self_attn.", prefix + "mlp."
    return DenseLayer(
        input_norm=take(prefix + "input_layernorm.weight"),
        qkv=torch.cat([take(f"{attention}{name}_proj.weight") for name in "qkv"]),
        output=take(attention + "o_proj.weight"),
        post_norm=take(prefix + "post_attention_layernorm.weight"),
        mlp=MlpWeights(
            gate_up=torch.cat([take(feed + "gate_proj.weight"), take(feed + "up_proj.weight")]),
            down=take(feed + "down_proj.weight"),
        ),
    )
