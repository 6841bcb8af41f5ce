"""Mixture of experts. x: [T, H], router: [E, H], gate_up: [E, 2F, H], down: [E, H, F], k experts per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.layers.mlp import MlpWeights, gated_silu, mlp


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """Router, routed experts and the shared expert that every row passes."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared: MlpWeights


@dataclass(frozen=True, slots=True)
class MoeRule:
    """How many experts a row visits and how their outputs are weighed."""

    experts_per_token: int
    renormalise: bool
    scaling_factor: float


def route(x: Tensor, router: Tensor, rule: MoeRule) -> tuple[Tensor, Tensor]:
    """Weights and ids of the experts of each row, both [T, k]. Probabilities are fp32."""
    scores = F.linear(x, router).float().softmax(-1)
    weights, experts = torch.topk(scores, rule.experts_per_token, dim=-1)
    if rule.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.scaling_factor, experts


def moe(x: Tensor, weights: MoeWeights, rule: MoeRule) -> Tensor:
    """Routed experts plus the shared one.

    Rows are sorted by expert so that each expert runs once. Each row sums its own k outputs in the order of its
    ranking, so the sum does not depend on the rest of the batch.
    """
    row_weights, experts = route(x, weights.router, rule)
    order = experts.flatten().argsort(stable=True)
    rows = order.div(rule.experts_per_token, rounding_mode="floor")
    counts = torch.bincount(experts.flatten(), minlength=weights.gate_up.shape[0]).tolist()
    sorted_x = x.index_select(0, rows)
    outputs = torch.empty_like(sorted_x)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            part = sorted_x[start : start + count]
            inner = gated_silu(F.linear(part, weights.gate_up[expert]))
            outputs[order[start : start + count]] = F.linear(inner, weights.down[expert])
            start += count
    per_rank = outputs.view(x.shape[0], rule.experts_per_token, -1)
    routed = (per_rank * row_weights.to(x.dtype)[..., None]).sum(1)
    return routed + mlp(x, weights.shared)
