"""The routed experts of one layer with weights of any format: one linear layer for each of their two products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workers.engines.torch.layers.experts import visit_sorted
from workers.engines.torch.layers.linear import Linear
from workers.engines.torch.layers.mlp import gated_silu


class CompressedExperts:
    """gate_up: E layers from H to 2F, down: E layers from F to H."""

    def __init__(self, gate_up: Sequence[Linear], down: Sequence[Linear], first: int = 0) -> None:
        self.gate_up = tuple(gate_up)
        self.down = tuple(down)
        self.first = first
        self.count = len(self.gate_up)

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """See Experts. An expert's weights are decoded once for all rows that visit it."""

        def compute(expert: int, rows: Tensor) -> Tensor:
            return self.down[expert](gated_silu(self.gate_up[expert](rows)))

        return visit_sorted(x, chosen, weights, self.first, self.count, compute)
