"""Attention through PyTorch's own operators, on any device."""

from __future__ import annotations

from torch import Tensor

from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers import gqa, mla
from workers.engines.torch.layers.tiles import TileSizes


class TorchAttention:
    """Implements Attention: gathers a tile of a sequence's rows from the pool, attends with one fused kernel, merges tiles."""

    def __init__(self, sizes: TileSizes | None = None) -> None:
        self._sizes = sizes or TileSizes()

    def gqa(
        self, q: Tensor, layer: int, cache: KvCache, batch: ForwardBatch, num_kv_heads: int, window_tokens: int | None
    ) -> Tensor:
        """See Attention."""
        return gqa.attend(q, layer, cache, batch, num_kv_heads, window_tokens, self._sizes)

    def mla(self, q: Tensor, layer: int, cache: KvCache, batch: ForwardBatch, heads: mla.LatentHeads) -> Tensor:
        """See Attention."""
        return mla.attend(q, layer, cache, batch, heads, self._sizes)
