"""What the decoders ask of an attention backend."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.mla import LatentHeads


class Attention(Protocol):
    """Computes attention of all rows of a batch, whose own KV rows are in the cache already."""

    def gqa(
        self, q: Tensor, layer: int, cache: KvCache, batch: ForwardBatch, num_kv_heads: int, window_tokens: int | None
    ) -> Tensor:
        """Grouped-query attention, [T, N * D] from rotated q, [T, N, D].

        A row at position p sees positions `(p - window_tokens, p]`, or all up to p when there is no window.
        """
        ...

    def mla(self, q: Tensor, layer: int, cache: KvCache, batch: ForwardBatch, heads: LatentHeads) -> Tensor:
        """Multi-head latent attention, [T, N * V] from q, [T, N, O + P], rotated and scaled by position."""
        ...
