"""Mixture of experts. x: [T, H], router: [E, H], k experts per row, plus one shared expert that every row passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.layers.experts import Experts
from workers.engines.torch.layers.mlp import MlpWeights, mlp

# The routed experts hold k copies of their rows; 2,048 rows of 4 experts and hidden size 4,096 are 67 MB in bf16, and
# every expert of 128 still sees 64 of them on average.
CHUNK_ROWS = 2048


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """Router, routed experts and the shared expert that every row passes."""

    router: Tensor
    experts: Experts
    shared: MlpWeights
    visits: Tensor | None = None  # [E] int64: rows that each expert was chosen for since the start, in place


@dataclass(frozen=True, slots=True)
class MoeRule:
    """How many experts a row visits and how their outputs are weighed."""

    experts_per_token: int
    renormalise: bool
    scaling_factor: float
    num_groups: int = 1  # of the experts; each has two or more when there are several
    groups_per_token: int = 1


def route(x: Tensor, router: Tensor, rule: MoeRule) -> tuple[Tensor, Tensor]:
    """Weights and ids of the experts of each row, both [T, k]. Probabilities are fp32."""
    scores = F.linear(x, router).float().softmax(-1)
    weights, experts = torch.topk(_best_groups(scores, rule), rule.experts_per_token, dim=-1)
    if rule.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * rule.scaling_factor, experts


def _best_groups(scores: Tensor, rule: MoeRule) -> Tensor:
    """The scores with those of the groups left out set to 0; a group is as good as the sum of its two best experts."""
    if rule.groups_per_token == rule.num_groups:
        return scores
    grouped = scores.view(scores.shape[0], rule.num_groups, -1)
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(rule.groups_per_token, dim=-1).indices
    kept = torch.zeros_like(grouped[..., 0]).scatter_(-1, best, 1.0)
    return torch.mul(grouped, kept[..., None]).flatten(-2)


def moe(x: Tensor, weights: MoeWeights, rule: MoeRule) -> Tensor:
    """Routed experts plus the shared one; of several ranks the sum of all is the result. Rows go CHUNK_ROWS at a time."""
    if x.shape[0] > CHUNK_ROWS:
        return torch.cat([moe(rows, weights, rule) for rows in torch.split(x, CHUNK_ROWS)])
    row_weights, chosen = route(x, weights.router, rule)
    if weights.visits is not None:
        weights.visits.index_add_(0, chosen.flatten(), torch.ones_like(chosen, dtype=torch.int64).flatten())
    return weights.experts(x, chosen, row_weights) + mlp(x, weights.shared)
