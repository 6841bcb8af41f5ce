"""The gated SiLU feed-forward. x: [T, H], gate_up: [2F, H] (gate rows first), down: [H, F]."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """Gate and up projection fused by rows, and the down projection."""

    gate_up: Tensor
    down: Tensor


def mlp(x: Tensor, weights: MlpWeights) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    return F.linear(gated_silu(F.linear(x, weights.gate_up)), weights.down)


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu of the first half of the columns times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
