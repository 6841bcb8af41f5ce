"""The routed experts as two grouped products: for GPUs, where the host must not wait for the router's counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.layers.experts import Experts, PlainExperts
from workers.engines.torch.layers.mlp import gated_silu


class GroupedExperts:
    """Implements Experts over the weights of PlainExperts. No shape and no control flow depends on the router's choice."""

    def __init__(self, gate_up: Tensor, down: Tensor, first: int = 0) -> None:
        self.gate_up = gate_up
        self.down = down
        self.first = first
        self.count = gate_up.shape[0]

    @classmethod
    def of(cls, experts: Experts) -> Experts:
        """The grouped form of plain bf16 experts, the one dtype of the GPU kernel; any others as they are."""
        if not isinstance(experts, PlainExperts) or experts.gate_up.dtype is not torch.bfloat16:
            return experts
        return cls(experts.gate_up, experts.down, experts.first)

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """See Experts. Each row sums its own k outputs in the order of its ranking."""
        per_token = chosen.shape[1]
        local = chosen.flatten() - self.first
        # Rows of other ranks sort behind all groups, where the products leave whatever was in memory.
        local = torch.where((local >= 0) & (local < self.count), local, self.count)
        ids, order = local.sort(stable=True)
        ends = torch.searchsorted(ids, torch.arange(self.count, device=x.device), right=True).to(torch.int32)
        sorted_x = x.index_select(0, order.div(per_token, rounding_mode="floor"))
        inner = gated_silu(F.grouped_mm(sorted_x, self.gate_up.transpose(1, 2), offs=ends))
        found = F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends)
        found = found.masked_fill((ids == self.count)[:, None], 0)
        outputs = torch.empty_like(found).index_copy_(0, order, found).view(x.shape[0], per_token, -1)
        return (outputs * weights.to(x.dtype)[..., None]).sum(1)
