"""The gated SiLU feed-forward. x: [T, H], gate_up: [2F, H] (gate rows first), down: [H, F]."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """Gate and up projection fused by rows, and the down projection; of several ranks each holds a run of F."""

    gate_up: Linear
    down: Linear


def mlp(x: Tensor, weights: MlpWeights) -> Tensor:
    """down(silu(gate(x)) * up(x)); of several ranks the sum of all is the result."""
    return weights.down(gated_silu(weights.gate_up(x)))


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu of the first half of the columns times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
