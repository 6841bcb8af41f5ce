"""What every decoder offers the runner."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache


class Decoder(Protocol):
    """The weights of one model and the pass over them."""

    def forward(self, batch: ForwardBatch, cache: KvCache) -> Tensor:
        """Writes the KV rows of the batch and returns fp32 logits of its sample rows, [S, vocabulary]."""
        ...
