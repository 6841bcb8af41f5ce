"""What the programs of all models share: the residual rows, the head, and running both narrow or wide."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, bfloat16, float32

from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.linear import Linear
from workers.engines.torch.native.library import Library
from workers.engines.torch.native.pieces import F32, add_linear, add_norm
from workers.engines.torch.native.program import Buffers, Program


class Passes(ABC):
    """The passes of one model. The layout of the pool is learnt from the first batch."""

    def __init__(self, library: Library, max_rows: int, norm: Tensor, eps: float, head: Linear) -> None:
        self._library = library
        self._buffers = Buffers(max_rows)
        self._x = self._buffers.of(norm.shape[0], float32)
        self._normed = self._buffers.of(norm.shape[0], bfloat16)
        self._logits = self._buffers.of(head.out_features, float32)
        self._layers: Program | None = None
        self._head = Program(library)
        add_norm(self._head, self._x, norm, self._normed, eps)
        add_linear(self._head, self._normed, head, self._logits, F32)

    @abstractmethod
    def _record(self, cache: KvCache) -> Program:
        """From token ids to the residual rows."""

    def layers(self, batch: ForwardBatch, cache: KvCache, *, narrow: bool) -> None:
        """From token ids to the residual rows; KV rows are stored."""
        program = self._layers
        if program is None:
            program = self._layers = self._record(cache)
        if narrow:
            program.run_narrow(batch, cache)
        else:
            program.run_wide(batch, cache, batch.token_ids.shape[0])

    def select(self, rows: Tensor) -> None:
        """Moves these residual rows to the front."""
        self._x[: rows.shape[0]] = self._x.index_select(0, rows)

    def head(self, batch: ForwardBatch, cache: KvCache, rows: int, *, narrow: bool) -> Tensor:
        """Logits of the first `rows` residual rows, [rows, vocabulary] fp32; the next call overwrites them."""
        if narrow and rows == batch.token_ids.shape[0]:
            self._head.run_narrow(batch, cache)
        else:
            self._head.run_wide(batch, cache, rows)
        return self._logits[:rows]
