"""The routed experts of one layer: rows sorted by expert, so that each expert's weights are read once for a batch.

x: [T, H]; each row visits k experts of width F. A rank may hold a run of the experts: rows routed elsewhere add nothing
here, and the sum over ranks is the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.layers.mlp import gated_silu


class Experts(Protocol):
    """The experts `[first, first + count)` of a layer."""

    @property
    def first(self) -> int:
        """The id of the first expert held here."""
        ...

    @property
    def count(self) -> int:
        """How many are held here."""
        ...

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum, [T, H], of the experts `chosen`, [T, k] ids, by `weights`, [T, k] fp32."""
        ...


class PlainExperts:
    """Weights in the dtype of the activations. gate_up: [E, 2F, H], down: [E, H, F]."""

    def __init__(self, gate_up: Tensor, down: Tensor, first: int = 0) -> None:
        self.gate_up = gate_up
        self.down = down
        self.first = first
        self.count = gate_up.shape[0]

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """See Experts. Each row sums its own k outputs in the order of its ranking, whatever shares its batch."""

        def compute(expert: int, rows: Tensor) -> Tensor:
            return F.linear(gated_silu(F.linear(rows, self.gate_up[expert])), self.down[expert])

        return visit_sorted(x, chosen, weights, self.first, self.count, compute)


def visit_sorted(
    x: Tensor, chosen: Tensor, weights: Tensor, first: int, count: int, compute: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The weighted sum of Experts through `compute(expert held here from 0, its rows)`, called once for each visited expert."""
    per_token = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    rows = order.div(per_token, rounding_mode="floor")
    counts = torch.bincount(chosen.flatten(), minlength=first + count).tolist()
    sorted_x = x.index_select(0, rows)
    outputs = torch.zeros_like(sorted_x)
    start = sum(counts[:first])
    for expert, visits in enumerate(counts[first : first + count]):
        if visits:
            outputs[order[start : start + visits]] = compute(expert, sorted_x[start : start + visits])
            start += visits
    per_rank = outputs.view(x.shape[0], per_token, -1)
    return (per_rank * weights.to(x.dtype)[..., None]).sum(1)
