"""Rotary position embedding. positions: [T], tables: [T, D/2], x: [T, N, D]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engines.torch.config_rope import RopeConfig


@dataclass(frozen=True, slots=True)
class RopeTables:
    """Cosines and sines of one batch, [T, 1, D/2], in the dtype of the activations."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """The D/2 angular frequencies, fp32. Computed in fp32 throughout: positions multiply every rounding of theirs."""
    exponents = torch.arange(0, config.dim, 2, dtype=torch.float32) / config.dim
    base = config.theta**exponents
    if config.kind == "llama3":
        return _llama3(1.0 / base, config)
    if config.kind == "yarn":
        return _yarn(base, config)
    return 1.0 / base / config.factor


def _llama3(inverse: Tensor, config: RopeConfig) -> Tensor:
    wavelength = 2 * math.pi / inverse
    low = config.original_positions / config.low_freq_factor
    high = config.original_positions / config.high_freq_factor
    smooth = (config.original_positions / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - smooth) * inverse / config.factor + smooth * inverse
    scaled = torch.where(wavelength > low, inverse / config.factor, inverse)
    return torch.where((wavelength >= high) & (wavelength <= low), blended, scaled)


def _yarn(base: Tensor, config: RopeConfig) -> Tensor:
    low, high = correction_range(config)
    steps = torch.arange(config.dim // 2, dtype=torch.float32)
    interpolated = torch.clamp((steps - low) / (high - low), 0, 1)
    extrapolated = 1 - interpolated
    return (1.0 / (config.factor * base)) * (1 - extrapolated) + (1.0 / base) * extrapolated


def correction_range(config: RopeConfig) -> tuple[float, float]:
    """The pairs between which YaRN blends: those that turn `beta_fast` and `beta_slow` times over the original context."""

    def pair_of(turns: float) -> float:
        return config.dim * math.log(config.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_of(config.beta_fast), pair_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    return low, high if high != low else high + 0.001


def rope_tables(config: RopeConfig, inverse: Tensor, positions: Tensor, dtype: torch.dtype) -> RopeTables:
    """The tables for these positions, shared by all layers of a step."""
    angles = positions.float()[:, None] * inverse
    cos, sin = angles.cos() * config.table_factor, angles.sin() * config.table_factor
    return RopeTables(cos.to(dtype)[:, None, :], sin.to(dtype)[:, None, :], config.interleaved)


def rotate(x: Tensor, tables: RopeTables) -> Tensor:
    """Rotates every head of every row by the angle of its position; the order of values is kept."""
    if tables.interleaved:
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * tables.cos - odd * tables.sin, odd * tables.cos + even * tables.sin)
        return torch.stack(turned, dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * tables.cos - second * tables.sin, second * tables.cos + first * tables.sin), dim=-1)


def query_scale(positions: Tensor, beta: float, original_positions: int, dtype: torch.dtype) -> Tensor | None:
    """The factor of all query values per position, [T, 1, 1]; None when it is one everywhere."""
    if not beta:
        return None
    steps = torch.floor(positions / original_positions)
    return (1 + beta * torch.log(1 + steps)).to(dtype)[:, None, None]
