"""Parameters, bytes and cached state of a model, counted from the shapes of its blocks.

The counts are exact: tests compare them with published totals, to the last parameter where one is published.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from configs.schema.model_description import (
    Blocks,
    DenseFfn,
    GatedDelta,
    GroupedAttention,
    KvFormat,
    LatentAttention,
    Mamba2,
    ModelDescription,
    MoeFfn,
    WeightFormat,
)

# Bits of one weight with the scales of its group: int4 has 16 bits for 128 weights, nvfp4 8 for 16, mxfp4 8 for 32.
WEIGHT_BITS: dict[WeightFormat, float] = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4.125, "nvfp4": 4.5, "mxfp4": 4.25}
KV_BYTES: dict[KvFormat, int] = {"bf16": 2, "fp8": 1}
STATE_BYTES = 4  # recurrent states are kept in fp32
FOUR_BIT_FORMATS = frozenset({"int4", "nvfp4", "mxfp4"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Parameters of the parts of a model that engines treat apart."""

    embedding: int
    head: int  # 0 when it shares the embedding
    mixers: int  # matrices of attention and recurrent layers
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    routers: int
    small: int  # norms, biases, convolutions: kept in bf16 or fp32
    vision: int

    @property
    def total(self) -> int:
        """All weights, the encoder of images included."""
        return sum(getattr(self, one.name) for one in fields(self))

    @property
    def text(self) -> int:
        """All weights without the encoder of images."""
        return self.total - self.vision


def count(model: ModelDescription) -> ParameterCounts:
    """The parameters of a model."""
    rows = model.hidden * model.vocab
    ffns = [(blocks.count, blocks.ffn) for blocks in model.blocks]
    moes = [(number, ffn) for number, ffn in ffns if isinstance(ffn, MoeFfn)]
    return ParameterCounts(
        embedding=rows,
        head=0 if model.tied_embeddings else rows,
        mixers=sum(blocks.count * mixer_matrices(blocks, model.hidden) for blocks in model.blocks),
        dense_ffn=sum(number * dense_matrices(ffn, model.hidden) for number, ffn in ffns if isinstance(ffn, DenseFfn)),
        routed_experts=sum(number * moe.experts * expert_matrices(moe, model.hidden) for number, moe in moes)
        + sum(number * latent_matrices(moe, model.hidden) for number, moe in moes),
        shared_experts=sum(number * shared_matrices(moe, model.hidden) for number, moe in moes),
        routers=sum(number * moe.experts * model.hidden for number, moe in moes),
        small=model.hidden + sum(blocks.count * _small(blocks, model.hidden) for blocks in model.blocks),
        vision=model.vision.params if model.vision is not None else 0,
    )


def active(model: ModelDescription) -> int:
    """Parameters that one token of text meets, the head counted and the embedding table not."""
    counts = count(model)
    idle = sum(
        blocks.count * (blocks.ffn.experts - blocks.ffn.picks) * expert_matrices(blocks.ffn, model.hidden)
        for blocks in model.blocks
        if isinstance(blocks.ffn, MoeFfn)
    )
    idle_small = sum(
        blocks.count * (blocks.ffn.experts - blocks.ffn.picks) * _expert_biases(blocks.ffn, model.hidden)
        for blocks in model.blocks
        if isinstance(blocks.ffn, MoeFfn)
    )
    embedding = 0 if model.tied_embeddings else counts.embedding
    return counts.text - embedding - idle - idle_small


def weight_bytes(model: ModelDescription, weights: WeightFormat) -> float:
    """Bytes of all weights as they stand in GPU memory. Embedding, head, routers, norms and the encoder stay in bf16."""
    counts = count(model)
    linear = counts.mixers + counts.dense_ffn + counts.shared_experts
    experts = counts.routed_experts
    if weights in FOUR_BIT_FORMATS and model.four_bits == "experts":
        compressed = experts + counts.shared_experts
    else:
        compressed = experts + linear
    bits = WEIGHT_BITS[weights] * compressed + 16 * (counts.total - compressed)
    return bits / 8


def mixer_matrices(blocks: Blocks, hidden: int) -> int:
    """Weights of the matrices of one mixer."""
    mixer = blocks.mixer
    if isinstance(mixer, GroupedAttention):
        queries = mixer.heads * mixer.head_dim * (2 if mixer.output_gate else 1)
        return hidden * (queries + 2 * mixer.kv_heads * mixer.head_dim) + mixer.heads * mixer.head_dim * hidden
    if isinstance(mixer, LatentAttention):
        query_width = mixer.heads * (mixer.nope_dim + mixer.rope_dim)
        queries = hidden * query_width if mixer.q_rank is None else mixer.q_rank * (hidden + query_width)
        cached = hidden * (mixer.kv_rank + mixer.rope_dim) + mixer.kv_rank * mixer.heads * (mixer.nope_dim + mixer.value_dim)
        return queries + cached + mixer.heads * mixer.value_dim * hidden + _index_matrices(mixer, hidden)
    if isinstance(mixer, GatedDelta):
        keys, values = mixer.key_heads * mixer.key_dim, mixer.value_heads * mixer.value_dim
        return hidden * (2 * keys + 2 * values + 2 * mixer.value_heads) + values * hidden
    if isinstance(mixer, Mamba2):
        inner = mixer.heads * mixer.head_dim
        return hidden * (2 * inner + 2 * mixer.groups * mixer.state_dim + mixer.heads) + inner * hidden
    return 0


def dense_matrices(ffn: DenseFfn, hidden: int) -> int:
    """Weights of the matrices of one dense feed-forward layer."""
    return (3 if ffn.gated else 2) * hidden * ffn.width


def expert_matrices(moe: MoeFfn, hidden: int) -> int:
    """Weights of the matrices of one routed expert."""
    return (3 if moe.gated else 2) * (moe.latent or hidden) * moe.expert_width


def shared_matrices(moe: MoeFfn, hidden: int) -> int:
    """Weights of the matrices of the shared expert of one layer, its gate included."""
    return (3 if moe.gated else 2) * hidden * moe.shared_width + (hidden if moe.shared_gate else 0)


def latent_matrices(moe: MoeFfn, hidden: int) -> int:
    """Weights that take a token into the experts' narrower space and back."""
    return 0 if moe.latent is None else 2 * hidden * moe.latent


def kv_row_elements(blocks: Blocks) -> int:
    """Cached elements of one token in one block; the keys of a position scorer are not in it."""
    mixer = blocks.mixer
    if isinstance(mixer, GroupedAttention):
        return 2 * mixer.kv_heads * mixer.head_dim
    return mixer.kv_rank + mixer.rope_dim if isinstance(mixer, LatentAttention) else 0


def kv_bytes_per_token(model: ModelDescription, kv: KvFormat = "bf16") -> int:
    """Bytes that one more token of a long sequence keeps: blocks with a window keep no more than it (kv_bytes)."""
    return sum(_kv_bytes(blocks, kv) * blocks.count for blocks in model.blocks if _window(blocks) is None)


def kv_bytes(model: ModelDescription, context: int, kv: KvFormat = "bf16") -> int:
    """Bytes that a sequence of `context` tokens keeps in the cache; states of recurrent blocks are apart."""
    return sum(blocks.count * block_kv_bytes(blocks, context, kv) for blocks in model.blocks)


def block_kv_bytes(blocks: Blocks, context: int, kv: KvFormat = "bf16") -> int:
    """As kv_bytes, of one block."""
    return _kv_bytes(blocks, kv) * min(context, _window(blocks) or context)


def state_bytes(model: ModelDescription) -> int:
    """Bytes that a sequence keeps in recurrent blocks, whatever its length."""
    return sum(blocks.count * _state_elements(blocks) * STATE_BYTES for blocks in model.blocks)


def _kv_bytes(blocks: Blocks, kv: KvFormat) -> int:
    index = blocks.mixer.index_dim if isinstance(blocks.mixer, LatentAttention) else 0
    return kv_row_elements(blocks) * KV_BYTES[kv] + index  # the scorer's keys are fp8


def _window(blocks: Blocks) -> int | None:
    return blocks.mixer.window if isinstance(blocks.mixer, GroupedAttention) else None


def _state_elements(blocks: Blocks) -> int:
    mixer = blocks.mixer
    if isinstance(mixer, GatedDelta):
        channels = 2 * mixer.key_heads * mixer.key_dim + mixer.value_heads * mixer.value_dim
        return mixer.value_heads * mixer.key_dim * mixer.value_dim + channels * (mixer.conv_width - 1)
    if isinstance(mixer, Mamba2):
        channels = mixer.heads * mixer.head_dim + 2 * mixer.groups * mixer.state_dim
        return mixer.heads * mixer.head_dim * mixer.state_dim + channels * (mixer.conv_width - 1)
    return 0


def _index_matrices(mixer: LatentAttention, hidden: int) -> int:
    if not mixer.index_heads:
        return 0
    return (mixer.q_rank or hidden) * mixer.index_heads * mixer.index_dim + hidden * (mixer.index_dim + mixer.index_heads)


def _small(blocks: Blocks, hidden: int) -> int:
    """Norms, biases, convolutions and per-head vectors of one block."""
    return _small_mixer(blocks, hidden) + _small_ffn(blocks, hidden)


def _small_mixer(blocks: Blocks, hidden: int) -> int:
    mixer = blocks.mixer
    if isinstance(mixer, GroupedAttention):
        rows = (mixer.heads + mixer.kv_heads) * mixer.head_dim
        norms = {"none": 0, "head": 2 * mixer.head_dim, "row": rows}[mixer.qk_norm]
        biases = (rows + mixer.kv_heads * mixer.head_dim) if mixer.qkv_bias else 0
        return hidden + norms + biases + (hidden if mixer.out_bias else 0) + (mixer.heads if mixer.sinks else 0)
    if isinstance(mixer, LatentAttention):
        return hidden + (mixer.q_rank or 0) + mixer.kv_rank + 2 * mixer.index_dim
    if isinstance(mixer, GatedDelta):
        channels = 2 * mixer.key_heads * mixer.key_dim + mixer.value_heads * mixer.value_dim
        return hidden + channels * mixer.conv_width + 2 * mixer.value_heads + mixer.value_dim
    if isinstance(mixer, Mamba2):
        inner = mixer.heads * mixer.head_dim
        channels = inner + 2 * mixer.groups * mixer.state_dim
        return hidden + channels * (mixer.conv_width + 1) + 3 * mixer.heads + inner
    return 0


def _small_ffn(blocks: Blocks, hidden: int) -> int:
    ffn = blocks.ffn
    if ffn is None:
        return 0
    if isinstance(ffn, DenseFfn):
        return hidden
    return hidden + ffn.experts * _expert_biases(ffn, hidden) + (ffn.experts if ffn.router_bias else 0)


def _expert_biases(moe: MoeFfn, hidden: int) -> int:
    return (2 if moe.gated else 1) * moe.expert_width + hidden if moe.biases else 0
