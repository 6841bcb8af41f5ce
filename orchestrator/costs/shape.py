"""What one GPU of an instance has to do: a model on a layout on a GPU, as plain numbers.

A `RankShape` holds sums over blocks for one GPU, ready to be multiplied by the tokens of a step; `stacked` puts many of
them into arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from configs.schema.hardware import Hardware, Sourced, SourcedFraction
from configs.schema.model_description import (
    Blocks,
    DenseFfn,
    GatedDelta,
    GroupedAttention,
    LatentAttention,
    Mamba2,
    ModelDescription,
    MoeFfn,
    WeightFormat,
)
from orchestrator.costs import sizes
from orchestrator.costs.layout import Layout
from orchestrator.costs.number import Number

UNLIMITED = 1e12  # tokens: an attention without a window
ACTIVATION_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRates:
    """Peaks of one GPU in bytes and FLOPs for a second, and the achieved fractions of its kernels."""

    memory_bytes_per_s: Number
    link_bytes_per_s: Number
    nic_bytes_per_s: Number
    gpus_per_domain: Number  # that reach each other over the link
    bf16_flops: Number
    linear_flops: Number  # of the format that compressed linear layers multiply in
    expert_flops: Number
    memory_achieved: Number
    link_achieved: Number
    nic_achieved: Number
    bf16_achieved: Number
    linear_achieved: Number
    expert_achieved: Number
    attention_achieved: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Matrices that every token of a step passes: their weights on this GPU, and the bytes of these."""

    params: Number
    bytes: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Blocks of one kind of attention. A query reads at most `limit_tokens` keys; FLOPs are for a query and a key."""

    limit_tokens: Number
    kv_bytes_per_token: Number
    prefill_flops_per_pair: Number
    decode_flops_per_pair: Number
    index_bytes_per_token: Number = 0.0
    index_flops_per_pair: Number = 0.0  # over all keys, whatever the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Routed experts of equal layers: each token picks `picks` of all `experts`, each group holds its share of them."""

    layers: Number
    experts: Number
    picks: Number
    groups: Number  # expert groups: each GPU holds experts / groups
    expert_params: Number  # of one expert, its part on this GPU
    expert_bytes: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShape:
    """The work of one GPU. Tokens are those of its own data-parallel group; `groups` such groups meet in the experts."""

    rates: GpuRates
    tensor: Number
    data: Number
    hidden: Number
    compressed: Linear  # in the weights' format
    plain: Linear  # in bf16: what the format does not cover
    head: Linear
    attention: tuple[Attention, ...]
    experts: tuple[Experts, ...]
    state_bytes: Number  # of one sequence
    state_flops_per_token: Number
    activation_bytes_per_token: Number
    kernels: Number  # launched in a step
    reductions: Number  # sums over the tensor group in a step
    exchanges: Number  # dispatches and combines over expert groups in a step
    exchange_bytes_per_token: Number
    weight_bytes: Number  # in the memory of this GPU


def shape_of(model: ModelDescription, layout: Layout, gpu: Hardware) -> RankShape:
    """The work of one GPU of an instance."""
    counts = sizes.count(model)
    bits = sizes.WEIGHT_BITS[layout.weights]
    compressed, plain = _linear_layers(model, layout)
    head = model.hidden * model.vocab / layout.tensor
    moes = [(blocks.count, blocks.ffn) for blocks in model.blocks if isinstance(blocks.ffn, MoeFfn)]
    experts = tuple(_experts(number, moe, model.hidden, layout) for number, moe in moes)
    split = layout.gpus > 1
    embedding = head * ACTIVATION_BYTES * (0 if model.tied_embeddings else 1)
    return RankShape(
        rates=_rates(gpu, layout.weights),
        tensor=float(layout.tensor),
        data=float(layout.data),
        hidden=float(model.hidden),
        compressed=Linear(params=compressed, bytes=compressed * bits / 8),
        plain=Linear(params=plain, bytes=plain * 2),
        head=Linear(params=head, bytes=head * 2),
        attention=tuple(attention_of(blocks, layout) for blocks in model.blocks if attends(blocks)),
        experts=_merged(experts),
        state_bytes=sizes.state_bytes(model) / layout.tensor,
        state_flops_per_token=sum(blocks.count * state_flops(blocks) for blocks in model.blocks) / layout.tensor,
        activation_bytes_per_token=sum(blocks.count * _activations(blocks, model.hidden, layout) for blocks in model.blocks),
        kernels=float(sum(blocks.count * _kernels(blocks) for blocks in model.blocks) + 6),
        reductions=float(sum(blocks.count * _reductions(blocks, layout) for blocks in model.blocks)),
        exchanges=float(2 * sum(number for number, _ in moes)) if split and layout.data > 1 else 0.0,
        exchange_bytes_per_token=max((float(moe.picks * (moe.latent or model.hidden)) for _, moe in moes), default=0.0),
        weight_bytes=(compressed * bits / 8 + plain * 2 + head * 2 + embedding + counts.vision * 2)
        + sum(one.layers * one.experts / one.groups * one.expert_bytes for one in experts),
    )


def stacked(shapes: Sequence[RankShape]) -> RankShape:
    """One shape with an array in every field, in the order given. Missing kinds of attention and experts count nothing."""
    attentions = max(len(shape.attention) for shape in shapes)
    moes = max(len(shape.experts) for shape in shapes)
    padded = [
        replace(
            shape,
            attention=shape.attention + (_NO_ATTENTION,) * (attentions - len(shape.attention)),
            experts=shape.experts + (_NO_EXPERTS,) * (moes - len(shape.experts)),
        )
        for shape in shapes
    ]
    found = _stack(padded)
    assert isinstance(found, RankShape)
    return found


_NO_ATTENTION = Attention(limit_tokens=UNLIMITED, kv_bytes_per_token=0.0, prefill_flops_per_pair=0.0, decode_flops_per_pair=0.0)
_NO_EXPERTS = Experts(layers=0.0, experts=1.0, picks=0.0, groups=1.0, expert_params=0.0, expert_bytes=0.0)


def _stack(rows: Sequence[object]) -> object:
    first = rows[0]
    if isinstance(first, tuple):
        return tuple(_stack(column) for column in zip(*rows, strict=True))
    if isinstance(first, float | int):
        return np.array(rows, dtype=np.float64)
    return type(first)(**{one.name: _stack([getattr(row, one.name) for row in rows]) for one in fields(first)})  # type: ignore[arg-type]


def _rates(gpu: Hardware, weights: WeightFormat) -> GpuRates:
    peaks, achieved = gpu.peaks, gpu.achieved
    linear, linear_achieved = _multiplies_in(gpu, weights)
    return GpuRates(
        memory_bytes_per_s=peaks.memory_tb_per_s.value * 1e12,
        link_bytes_per_s=peaks.link_gb_per_s.value * 1e9,
        nic_bytes_per_s=peaks.nic_gbit_per_s.value * 1e9 / 8,
        gpus_per_domain=float(gpu.gpus_per_domain),
        bf16_flops=peaks.bf16_tflops.value * 1e12,
        linear_flops=linear * 1e12,
        expert_flops=linear * 1e12,
        memory_achieved=achieved.memory.value,
        link_achieved=achieved.link.value,
        nic_achieved=achieved.nic.value,
        bf16_achieved=achieved.gemm_bf16.value,
        linear_achieved=linear_achieved,
        expert_achieved=achieved.moe.value * linear_achieved / (achieved.gemm_fp8 or achieved.gemm_bf16).value,
        attention_achieved=achieved.attention.value,
    )


def _multiplies_in(gpu: Hardware, weights: WeightFormat) -> tuple[float, float]:
    """Peak and achieved fraction for products with such weights: where the GPU lacks the format it multiplies in bf16."""
    peaks, achieved = gpu.peaks, gpu.achieved
    chosen: dict[WeightFormat, tuple[Sourced | None, SourcedFraction | None]] = {
        "fp8": (peaks.fp8_tflops, achieved.gemm_fp8),
        "int8": (peaks.int8_tops, achieved.gemm_int8),
        "nvfp4": (peaks.fp4_tflops, achieved.gemm_fp4),
        "mxfp4": (peaks.fp4_tflops, achieved.gemm_fp4),
    }
    peak, fraction = chosen.get(weights, (None, None))
    if peak is None or fraction is None:
        return peaks.bf16_tflops.value, achieved.gemm_bf16.value
    return peak.value, fraction.value


def _linear_layers(model: ModelDescription, layout: Layout) -> tuple[float, float]:
    """Weights on one GPU of the layers that every token passes: in the weights' format, and in bf16."""
    experts_only = layout.weights in sizes.FOUR_BIT_FORMATS and model.four_bits == "experts"
    mixers = dense = shared = routers = 0.0
    for blocks in model.blocks:
        whole = _unsplit(blocks, model.hidden)
        mixers += blocks.count * (whole + (sizes.mixer_matrices(blocks, model.hidden) - whole) / layout.tensor)
        if isinstance(blocks.ffn, DenseFfn):
            dense += blocks.count * sizes.dense_matrices(blocks.ffn, model.hidden) / layout.tensor
        if isinstance(blocks.ffn, MoeFfn):
            shared += blocks.count * sizes.shared_matrices(blocks.ffn, model.hidden) / layout.tensor
            routers += blocks.count * (blocks.ffn.experts * model.hidden + sizes.latent_matrices(blocks.ffn, model.hidden))
    if experts_only:
        return shared, mixers + dense + routers
    return mixers + dense + shared, routers


def _unsplit(blocks: Blocks, hidden: int) -> int:
    """Weights of a mixer that every GPU of the tensor group holds whole: what makes the latent rows."""
    mixer = blocks.mixer
    if not isinstance(mixer, LatentAttention):
        return 0
    return hidden * ((mixer.q_rank or 0) + mixer.kv_rank + mixer.rope_dim)


def attends(blocks: Blocks) -> bool:
    """True when the blocks read a cache."""
    return isinstance(blocks.mixer, GroupedAttention | LatentAttention)


def attention_of(blocks: Blocks, layout: Layout) -> Attention:
    """The attention of blocks that have one, for one GPU."""
    mixer, number = blocks.mixer, blocks.count
    element = sizes.KV_BYTES[layout.kv]
    if isinstance(mixer, GroupedAttention):
        kv_heads = max(1.0, mixer.kv_heads / layout.tensor)
        pair = 4.0 * number * mixer.heads / layout.tensor * mixer.head_dim
        return Attention(
            limit_tokens=float(mixer.window) if mixer.window is not None else UNLIMITED,
            kv_bytes_per_token=2.0 * number * kv_heads * mixer.head_dim * element,
            prefill_flops_per_pair=pair,
            decode_flops_per_pair=pair,
        )
    assert isinstance(mixer, LatentAttention)
    heads = mixer.heads / layout.tensor
    return Attention(
        limit_tokens=float(mixer.index_picks or UNLIMITED),
        kv_bytes_per_token=float(number * (mixer.kv_rank + mixer.rope_dim) * element),
        prefill_flops_per_pair=2.0 * number * heads * (mixer.nope_dim + mixer.rope_dim + mixer.value_dim),
        decode_flops_per_pair=2.0 * number * heads * (2 * mixer.kv_rank + mixer.rope_dim),
        index_bytes_per_token=float(number * mixer.index_dim),
        index_flops_per_pair=2.0 * number * mixer.index_heads * mixer.index_dim,
    )


def _experts(number: int, moe: MoeFfn, hidden: int, layout: Layout) -> Experts:
    params = sizes.expert_matrices(moe, hidden) / layout.expert_tensor
    return Experts(
        layers=float(number),
        experts=float(moe.experts),
        picks=float(moe.picks),
        groups=float(layout.expert),
        expert_params=params,
        expert_bytes=params * sizes.WEIGHT_BITS[layout.weights] / 8,
    )


def _merged(experts: tuple[Experts, ...]) -> tuple[Experts, ...]:
    """Layers whose experts are alike count as one kind."""
    kinds: dict[Experts, float] = {}
    for one in experts:
        kind = replace(one, layers=0.0)
        kinds[kind] = kinds.get(kind, 0.0) + float(one.layers)
    return tuple(replace(kind, layers=layers) for kind, layers in kinds.items())


def state_flops(blocks: Blocks) -> float:
    """Of one token in a recurrent block: decay, update and read of the state."""
    mixer = blocks.mixer
    if isinstance(mixer, GatedDelta):
        return 8.0 * mixer.value_heads * mixer.key_dim * mixer.value_dim
    if isinstance(mixer, Mamba2):
        return 6.0 * mixer.heads * mixer.head_dim * mixer.state_dim
    return 0.0


def _activations(blocks: Blocks, hidden: int, layout: Layout) -> float:
    """Bytes that a token writes and reads between the products of one block: norms and residuals are not split."""
    elements = 0.0
    mixer, ffn = blocks.mixer, blocks.ffn
    if mixer is not None:
        width = getattr(mixer, "heads", 0) * getattr(mixer, "head_dim", getattr(mixer, "value_dim", 0))
        width = width or getattr(mixer, "value_heads", 0) * getattr(mixer, "value_dim", 0)
        elements += 4.0 * hidden + 6.0 * width / layout.tensor
    if isinstance(ffn, DenseFfn):
        elements += 4.0 * hidden + 6.0 * ffn.width / layout.tensor
    if isinstance(ffn, MoeFfn):
        rows = ffn.picks / layout.expert
        elements += 4.0 * hidden + rows * (2.0 * (ffn.latent or hidden) + 6.0 * ffn.expert_width / layout.expert_tensor)
        elements += 6.0 * ffn.shared_width / layout.tensor
    return elements * ACTIVATION_BYTES


_MIXER_KERNELS = {"grouped": 5, "latent": 9, "gated_delta": 8, "mamba2": 7}
_FFN_KERNELS = {"dense": 4, "moe": 3}  # the routing of experts is priced apart


def _kernels(blocks: Blocks) -> int:
    """Launches of one block, as engines fuse them today."""
    mixer = _MIXER_KERNELS[blocks.mixer.kind] if blocks.mixer is not None else 0
    return mixer + (_FFN_KERNELS[blocks.ffn.kind] if blocks.ffn is not None else 0)


def _reductions(blocks: Blocks, layout: Layout) -> int:
    if layout.tensor == 1:
        return 0
    dense_experts = layout.data > 1 and isinstance(blocks.ffn, MoeFfn)
    return (blocks.mixer is not None) + (blocks.ffn is not None and not dense_experts)
