"""What capacity planning must know of a model: the shapes of its blocks, and what was published about their sum."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import Line, Name, Section

Size = Annotated[int, Field(ge=1, le=100_000_000)]
Count = Annotated[int, Field(ge=0, le=100_000_000)]
WeightFormat = Literal["bf16", "fp8", "int8", "int4", "nvfp4", "mxfp4"]
KvFormat = Literal["bf16", "fp8"]


class GroupedAttention(Section):
    """Softmax attention with `kv_heads` cached heads; with a window, keys further back than it are not read."""

    kind: Literal["grouped"] = "grouped"
    heads: Size
    kv_heads: Size
    head_dim: Size
    window: Size | None = None
    qk_norm: Literal["none", "head", "row"] = "none"  # one weight for each element of a head, or of the whole row
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    output_gate: bool = False


class LatentAttention(Section):
    """Multi-head latent attention: one latent row of kv_rank + rope_dim is cached for each token, on every rank.

    With `index_heads` a small scorer chooses the `index_picks` positions that are read; its keys are cached too.
    """

    kind: Literal["latent"] = "latent"
    heads: Size
    q_rank: Size | None
    kv_rank: Size
    nope_dim: Size
    rope_dim: Size
    value_dim: Size
    index_heads: Count = 0
    index_dim: Count = 0
    index_picks: Count = 0


class GatedDelta(Section):
    """Gated DeltaNet: a state of value_heads x key_dim x value_dim for each sequence instead of a cache."""

    kind: Literal["gated_delta"] = "gated_delta"
    key_heads: Size
    value_heads: Size
    key_dim: Size
    value_dim: Size
    conv_width: Size


class Mamba2(Section):
    """Mamba-2: a state of heads x head_dim x state_dim for each sequence instead of a cache."""

    kind: Literal["mamba2"] = "mamba2"
    heads: Size
    head_dim: Size
    groups: Size
    state_dim: Size
    conv_width: Size


class DenseFfn(Section):
    """A feed-forward layer; gated ones have three matrices, others two."""

    kind: Literal["dense"] = "dense"
    width: Size
    gated: bool = True


class MoeFfn(Section):
    """Routed experts, and a shared one of `shared_width` (0: none). A latent width narrows what the routed ones see."""

    kind: Literal["moe"] = "moe"
    experts: Size
    picks: Size
    expert_width: Size
    shared_width: Count = 0
    gated: bool = True
    latent: Size | None = None
    biases: bool = False
    router_bias: bool = False
    shared_gate: bool = False


Mixer = Annotated[GroupedAttention | LatentAttention | GatedDelta | Mamba2, Field(discriminator="kind")]
Ffn = Annotated[DenseFfn | MoeFfn, Field(discriminator="kind")]


class Blocks(Section):
    """`count` equal blocks: a mixer of tokens, a feed-forward layer, or both, each with a norm before it."""

    count: Size
    mixer: Mixer | None = None
    ffn: Ffn | None = None


class Vision(Section):
    """The encoder before the decoder: `layers` x (attention + MLP) of `hidden` over patches, then a projector."""

    layers: Size
    hidden: Size
    width: Size
    gated: bool
    patch_pixels: Size
    merge: Size  # patches along each side of what becomes one token
    params: Annotated[int, Field(ge=1, le=100_000_000_000)]  # tower and projector


class Published(Section):
    """What others say of the sum. `total` may count less than all weights: `counts` says what it counts."""

    total: Annotated[int, Field(gt=0)]
    counts: Literal["all", "text"]
    tolerance: Annotated[float, Field(ge=0, le=0.02)] = 0.0
    source: Line
    active: Annotated[int, Field(gt=0)] | None = None
    active_counts: Literal["with_head", "with_both", "without_embeddings"] = "with_head"
    active_tolerance: Annotated[float, Field(ge=0, le=0.05)] = 0.025
    active_source: Line | None = None


class ModelDescription(Section):
    """One model. `four_bits` says which linear layers a four-bit checkpoint compresses; the rest of it stays bf16."""

    name: Name
    title: Line
    aliases: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    source: Line
    hidden: Size
    vocab: Size
    tied_embeddings: bool = False
    context_tokens: Size
    default_format: WeightFormat = "bf16"
    four_bits: Literal["experts", "linear"] = "linear"
    blocks: Annotated[tuple[Blocks, ...], Field(strict=False, min_length=1, max_length=512)]
    vision: Vision | None = None
    published: Published | None = None
