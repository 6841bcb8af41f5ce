"""The rotary position embedding of a checkpoint: `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from workers.engines.torch.config_section import ConfigSection


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How `dim` values of a head are rotated. Fields beyond the first four serve the kinds that name them."""

    kind: str  # "default", "linear", "llama3" or "yarn"
    dim: int
    theta: float
    interleaved: bool  # pairs (0, 1), (2, 3), ... instead of (i, i + dim / 2)
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole bounds of the correction range
    table_factor: float = 1.0  # yarn: multiplies cos and sin
    query_scale_beta: float = 0.0  # queries grow by 1 + beta * ln(1 + floor(position / original_positions))


def read_rope(section: ConfigSection, *, dim: int, interleaved: bool, kinds: tuple[str, ...]) -> RopeConfig:
    """Reads the rotation of a text configuration. Raises ModelError for a kind outside `kinds` or an odd `dim`."""
    key = "rope_parameters" if section.has("rope_parameters") else "rope_scaling"
    values = section.section(key) if section.has(key) else ConfigSection({}, "rope_parameters")
    kind = values.text("rope_type", values.text("type", "default"))
    if kind not in kinds:
        raise section.error(f"{key}.rope_type", f"{kind!r} is not supported here (only {', '.join(kinds)})")
    if dim % 2:
        raise section.error("head_dim", f"{dim}: rotation needs an even width")
    theta = values.number("rope_theta", section.number("rope_theta", 10_000.0))
    if kind == "llama3":
        return RopeConfig(
            kind=kind,
            dim=dim,
            theta=theta,
            interleaved=interleaved,
            factor=values.number("factor"),
            original_positions=values.integer("original_max_position_embeddings"),
            low_freq_factor=values.number("low_freq_factor"),
            high_freq_factor=values.number("high_freq_factor"),
        )
    if kind == "yarn":
        return _read_yarn(values, dim, theta, interleaved)
    return RopeConfig(
        kind=kind,
        dim=dim,
        theta=theta,
        interleaved=interleaved,
        factor=values.number("factor") if kind == "linear" else 1.0,
        original_positions=values.optional_integer("original_max_position_embeddings") or 0,
        query_scale_beta=values.number("llama_4_scaling_beta", 0.0),
    )


def _read_yarn(values: ConfigSection, dim: int, theta: float, interleaved: bool) -> RopeConfig:
    values.refuse_unless("apply_scale", False)
    factor = values.number("factor")
    mscale, mscale_all_dim = values.number("mscale", 0.0), values.number("mscale_all_dim", 0.0)
    default_table_factor = _magnitude(factor, 1.0)
    if mscale and mscale_all_dim:
        default_table_factor = _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
    return RopeConfig(
        kind="yarn",
        dim=dim,
        theta=theta,
        interleaved=interleaved,
        factor=factor,
        original_positions=values.integer("original_max_position_embeddings"),
        beta_fast=values.number("beta_fast", 32.0),
        beta_slow=values.number("beta_slow", 1.0),
        truncate=values.flag("truncate", True),
        table_factor=values.number("attention_factor", default_table_factor),
        query_scale_beta=values.number("llama_4_scaling_beta", 0.0),
    )


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
