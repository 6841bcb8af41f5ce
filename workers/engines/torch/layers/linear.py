"""Matrix products with stored weights, y = x W^T. One class for each way in which a weight lies in memory."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """One weight, [O, I], of one rank."""

    @property
    def out_features(self) -> int:
        """O."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """[T, I] to [T, O], in the dtype of x. A row's result does not depend on what other rows hold."""
        ...


class PlainLinear:
    """A weight in the dtype of the activations."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @property
    def out_features(self) -> int:
        """See Linear."""
        return self.weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """See Linear."""
        return F.linear(x, self.weight)
