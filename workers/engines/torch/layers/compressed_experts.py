"""The routed experts of one layer with weights of any format: one linear layer for each of their two products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
        per_token = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        rows = order.div(per_token, rounding_mode="floor")
        counts = torch.bincount(chosen.flatten(), minlength=self.first + self.count).tolist()
        sorted_x = x.index_select(0, rows)
        outputs = torch.zeros_like(sorted_x)
        start = sum(counts[: self.first])
        for expert, count in enumerate(counts[self.first : self.first + self.count]):
            if count:
                inner = gated_silu(self.gate_up[expert](sorted_x[start : start + count]))
                outputs[order[start : start + count]] = self.down[expert](inner)
                start += count
        per_rank = outputs.view(x.shape[0], per_token, -1)
        return (per_rank * weights.to(x.dtype)[..., None]).sum(1)
