"""What every decoder offers the runner."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.linear import Linear
from workers.engines.torch.layers.norm import rms_norm
from workers.engines.torch.ranks import Ranks


class Decoder(Protocol):
    """The weights of one model and the pass over them."""

    def forward(self, batch: ForwardBatch, cache: KvCache) -> Tensor:
        """Writes the KV rows of the batch and returns fp32 logits of its sample rows, [S, vocabulary], on every rank."""
        ...

    def expert_visits(self) -> tuple[int, ...]:
        """Rows that each routed expert was chosen for since the start, over all layers; empty for a dense model.

        Padding rows of graphs and fixed passes are counted. May be called from any thread.
        """
        ...


def logits_of(x: Tensor, batch: ForwardBatch, norm: Tensor, eps: float, head: Linear, ranks: Ranks) -> Tensor:
    """Final norm and head of the sample rows, [S, vocabulary], fp32."""
    last = x if batch.sample_rows is None else x.index_select(0, batch.sample_rows)
    return ranks.join_columns(head(rms_norm(last, norm, eps))).float()
