"""Attention through PyTorch's own operators, on any device."""

from __future__ import annotations

from torch import Tensor

from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers import gqa, mla


class TorchAttention:
    """Implements Attention: gathers the rows of a sequence from the pool, then one fused kernel."""

    def gqa(
        self, q: Tensor, layer: int, cache: KvCache, batch: ForwardBatch, num_kv_heads: int, window_tokens: int | None
    ) -> Tensor:
        """See Attention."""
        if window_tokens is not None:
            raise NotImplementedError("attention over a window")
        return gqa.attend(q, layer, cache, batch, num_kv_heads)

    def mla(self, q: Tensor, layer: int, cache: KvCache, batch: ForwardBatch, heads: mla.LatentHeads) -> Tensor:
        """See Attention."""
        return mla.attend(q, layer, cache, batch, heads)
