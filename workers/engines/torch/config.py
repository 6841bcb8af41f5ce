"""What a checkpoint's config.json says, as far as the decoders support it. Anything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.native_params import NATIVE_PARAMS, config_from_params, layout_of_folder
from protos.contract.errors import ModelError
from workers.engines.torch.config_rope import RopeConfig, read_rope
from workers.engines.torch.config_section import ConfigSection
from workers.engines.torch.config_window import read_window

AUTAN_METHOD = "autan-weight-only"  # quant_method of the project's own int8 and int4 weights


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig:
    """A decoder of the Llama and Mistral shape: grouped-query attention, gated SiLU, RMSNorm, no biases."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    tie_word_embeddings: bool
    rope: RopeConfig
    window_tokens: int | None = None  # a row of a window layer sees so many tokens, its own included
    window_layers: tuple[bool, ...] = ()  # which layers have the window; empty: all of them, if there is one
    query_scale_beta: float = 0.0  # queries grow by 1 + beta * ln(1 + floor(position / query_scale_positions))
    query_scale_positions: int = 1

    def window_of(self, layer: int) -> int | None:
        """The window of one layer in tokens; None: a row sees all before it."""
        return self.window_tokens if not self.window_layers or self.window_layers[layer] else None

    @property
    def kv_row_values(self) -> int:
        """Values cached per token and layer: keys of all KV heads, then values of all KV heads."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def kv_layout_name(self) -> str:
        """Names the meaning of a KV row."""
        return "gqa:k+v"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistral4Config:
    """A decoder of the Mistral Small 4 shape: latent attention (MLA) and a mixture of experts.

    The softmax scale is always `qk_head_dim ** -0.5`: the released model applies no YaRN magnitude correction, because
    the per-position query scale replaces it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int | None  # None: one projection makes the queries
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_dense_layers: int
    num_experts: int
    num_experts_per_token: int
    num_expert_groups: int  # experts are chosen from the best `num_groups_per_token` of so many groups
    num_groups_per_token: int
    num_shared_experts: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    max_positions: int
    tie_word_embeddings: bool
    rope: RopeConfig
    query_scale_beta: float
    query_scale_positions: int

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_row_values(self) -> int:
        """Values cached per token and layer: the normed latent, then the rotated key that all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def kv_layout_name(self) -> str:
        """Names the meaning of a KV row."""
        return "mla:latent+rope"


DecoderConfig = DenseConfig | Mistral4Config


def read_config(model_dir: Path) -> DecoderConfig:
    """Reads `config.json` or `params.json` of a checkpoint folder. Raises ModelError that names the key at fault."""
    raw, where = read_raw_config(model_dir)
    return parse_config(raw, where)


def read_raw_config(model_dir: Path) -> tuple[dict[str, Any], str]:
    """The configuration in the words of config.json, and the file it is from. Raises ModelError."""
    if layout_of_folder(model_dir) == "native":
        path = model_dir / NATIVE_PARAMS
        return config_from_params(_json_object(path), str(path)), str(path)
    path = model_dir / "config.json"
    return _json_object(path), str(path)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path.parent} is not a checkpoint folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: expected an object, found {type(raw).__name__}")
    return raw


def parse_config(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """The decoder that the mapping describes. Raises ModelError that names the key at fault."""
    outer = ConfigSection(raw, where)
    _check_quantization(outer)
    model_type = outer.text("model_type")
    inner = outer
    if model_type == "mistral3":
        inner = outer.section("text_config")
        _check_quantization(inner)
        model_type = inner.text("model_type")
    if model_type in ("llama", "mistral", "ministral", "ministral3"):
        return _dense(outer, inner, model_type)
    if model_type == "mistral4":
        return _mistral4(outer, inner)
    raise inner.error(
        "model_type",
        f"{model_type!r} is not supported (llama, mistral, ministral, ministral3, mistral4, or mistral3 around one of them)",
    )


def _check_quantization(section: ConfigSection) -> None:
    """Refuses schemes that the loader does not decode; the tensors themselves say which of the others applies."""
    if not section.has("quantization_config"):
        return
    found = section.section("quantization_config")
    method = found.text("quant_method")
    if method == "fp8":
        found.refuse_unless("weight_block_size", None, "only one scale per tensor is")
        # Activations are computed in the engine's dtype, so it does not matter where their scales would come from.
        if found.text("activation_scheme", "") not in ("static", "dynamic"):
            raise found.error("activation_scheme", "only static or dynamic are supported, with one scale per weight")
    elif method == "compressed-tensors":
        if found.text("format") != "nvfp4-pack-quantized":
            raise found.error("format", f"{found.text('format')!r} is not supported; only 'nvfp4-pack-quantized' is")
    elif method != AUTAN_METHOD:
        raise found.error("quant_method", f"{method!r} is not supported; fp8, compressed-tensors and {AUTAN_METHOD} are")


def _common_refusals(inner: ConfigSection) -> None:
    inner.refuse_unless("attention_bias", False)
    inner.refuse_unless("mlp_bias", False)
    inner.refuse_unless("hidden_act", "silu")


def _dense(outer: ConfigSection, inner: ConfigSection, model_type: str) -> DenseConfig:
    _common_refusals(inner)
    window, window_layers = read_window(inner, inner.integer("num_hidden_layers"), model_type)
    hidden, heads = inner.integer("hidden_size"), inner.integer("num_attention_heads")
    head_dim = inner.optional_integer("head_dim") or hidden // heads
    kv_heads = inner.optional_integer("num_key_value_heads") or heads
    if heads % kv_heads:
        raise inner.error("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    interleaved = inner.flag("rope_interleave", False)
    rope = read_rope(inner, dim=head_dim, interleaved=interleaved, kinds=("default", "linear", "llama3", "yarn"))
    return DenseConfig(
        architecture=f"dense:{model_type}",
        vocab_size=inner.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=inner.integer("intermediate_size"),
        num_layers=inner.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=inner.number("rms_norm_eps", 1e-6),
        max_positions=inner.integer("max_position_embeddings"),
        tie_word_embeddings=_tied(outer, inner),
        rope=rope,
        window_tokens=window,
        window_layers=window_layers,
        # The older decoders pass over the key.
        query_scale_beta=rope.query_scale_beta if model_type == "ministral3" else 0.0,
        query_scale_positions=rope.original_positions or inner.integer("max_position_embeddings"),
    )


def _mistral4(outer: ConfigSection, inner: ConfigSection) -> Mistral4Config:
    _common_refusals(inner)
    inner.refuse_unless("scoring_func", "softmax")
    heads = inner.integer("num_attention_heads")
    kv_heads = inner.optional_integer("num_key_value_heads") or heads
    if kv_heads != heads:
        raise inner.error("num_key_value_heads", f"{kv_heads}: latent attention has as many as num_attention_heads ({heads})")
    experts, per_token = inner.integer("n_routed_experts"), inner.integer("num_experts_per_tok")
    if per_token > experts:
        raise inner.error("num_experts_per_tok", f"{per_token} of {experts} experts")
    groups, groups_kept = _expert_groups(inner, experts, per_token)
    rope_dim = inner.integer("qk_rope_head_dim")
    interleaved = inner.flag("rope_interleave", True)
    rope = read_rope(inner, dim=rope_dim, interleaved=interleaved, kinds=("default", "yarn"))
    return Mistral4Config(
        architecture="mistral4",
        vocab_size=inner.integer("vocab_size"),
        hidden_size=inner.integer("hidden_size"),
        num_layers=inner.integer("num_hidden_layers"),
        num_heads=heads,
        q_lora_rank=None if inner.is_null("q_lora_rank") else inner.integer("q_lora_rank"),
        kv_lora_rank=inner.integer("kv_lora_rank"),
        qk_nope_head_dim=inner.integer("qk_nope_head_dim"),
        qk_rope_head_dim=rope_dim,
        v_head_dim=inner.integer("v_head_dim"),
        intermediate_size=inner.integer("intermediate_size"),
        moe_intermediate_size=inner.integer("moe_intermediate_size"),
        num_dense_layers=inner.optional_integer("first_k_dense_replace") or 0,
        num_experts=experts,
        num_experts_per_token=per_token,
        num_expert_groups=groups,
        num_groups_per_token=groups_kept,
        num_shared_experts=inner.integer("n_shared_experts"),
        norm_topk_prob=inner.flag("norm_topk_prob", True),
        routed_scaling_factor=inner.number("routed_scaling_factor", 1.0),
        rms_norm_eps=inner.number("rms_norm_eps", 1e-6),
        max_positions=inner.integer("max_position_embeddings"),
        tie_word_embeddings=_tied(outer, inner),
        rope=rope,
        query_scale_beta=rope.query_scale_beta,
        query_scale_positions=rope.original_positions or inner.integer("max_position_embeddings"),
    )


def _expert_groups(inner: ConfigSection, experts: int, per_token: int) -> tuple[int, int]:
    """Groups of experts, and how many of them a token chooses from."""
    groups, kept = inner.optional_integer("n_group") or 1, inner.optional_integer("topk_group") or 1
    if experts % groups or (groups > 1 and experts // groups < 2):
        raise inner.error("n_group", f"{groups}: {experts} experts must make equal groups of two or more")
    if kept > groups:
        raise inner.error("topk_group", f"{kept} of {groups} groups")
    if per_token > kept * (experts // groups):
        raise inner.error("topk_group", f"{kept} groups of {experts // groups} have no {per_token} experts")
    return groups, kept


def _tied(outer: ConfigSection, inner: ConfigSection) -> bool:
    # The wrapper decides: it owns lm_head.
    return outer.flag("tie_word_embeddings", inner.flag("tie_word_embeddings", False))
