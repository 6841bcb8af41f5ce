"""Experts whose matrix products have one shape, whatever the router chose."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engines.torch.layers.experts import Experts


class FixedRowExperts:
    """Implements Experts: a chosen expert computes every row of the pass, and a row takes those that it chose."""

    def __init__(self, inner: Experts) -> None:
        self._inner = inner
        self.first = inner.first
        self.count = inner.count

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """See Experts. Each row sums its own k outputs in the order of its ranking."""
        outputs = x.new_zeros(*chosen.shape, x.shape[1])
        one = torch.ones((x.shape[0], 1), dtype=weights.dtype, device=x.device)
        for expert in sorted(set(chosen.flatten().tolist())):
            if self.first <= expert < self.first + self.count:
                found = self._inner(x, torch.full_like(chosen[:, :1], expert), one)
                outputs = torch.where((chosen == expert)[..., None], found[:, None], outputs)
        return (outputs * weights.to(x.dtype)[..., None]).sum(1)
