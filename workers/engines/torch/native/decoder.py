"""The decoders in native code, for bf16 weights on a CPU: they stand before the torch decoder and compute the same."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engines.torch.config import DecoderConfig, DenseConfig
from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.models.decoder import Decoder
from workers.engines.torch.models.dense_weights import DenseWeights
from workers.engines.torch.models.mistral4_weights import Mistral4Weights
from workers.engines.torch.native.dense_program import DenseProgram
from workers.engines.torch.native.library import load_library
from workers.engines.torch.native.mistral4_program import Mistral4Program
from workers.engines.torch.native.passes import Passes

NARROW_ROWS = 64  # above, torch's matrix products are faster than those of the native step


class NativeDecoder:
    """Runs narrow steps as one call and wide ones operation by operation."""

    def __init__(self, passes: Passes, torch_decoder: Decoder, max_rows: int) -> None:
        self._passes = passes
        self._torch = torch_decoder
        self._max_rows = max_rows

    def expert_visits(self) -> tuple[int, ...]:
        """See Decoder.expert_visits."""
        return self._torch.expert_visits()

    def forward(self, batch: ForwardBatch, cache: KvCache) -> Tensor:
        """See Decoder.forward. A batch beyond the buffers goes to the torch decoder."""
        rows = batch.token_ids.shape[0]
        if rows > self._max_rows:
            return self._torch.forward(batch, cache)
        narrow = not batch.prefills and rows <= NARROW_ROWS
        self._passes.layers(batch, cache, narrow=narrow)
        if batch.sample_rows is not None:
            rows = batch.sample_rows.shape[0]
            self._passes.select(batch.sample_rows)
        return self._passes.head(batch, cache, rows, narrow=rows <= NARROW_ROWS)


def native_decoder(
    config: DecoderConfig, weights: DenseWeights | Mistral4Weights, torch_decoder: Decoder, max_rows: int
) -> Decoder:
    """The native decoder where there is one for these weights on this machine, else the torch decoder."""
    if weights.embedding.device.type != "cpu" or weights.embedding.dtype is not torch.bfloat16:
        return torch_decoder
    library = load_library()
    if library is None:
        return torch_decoder
    passes: Passes | None
    if isinstance(config, DenseConfig):
        assert isinstance(weights, DenseWeights)
        passes = DenseProgram.of(config, weights, library, max_rows)
    else:
        assert isinstance(weights, Mistral4Weights)
        passes = Mistral4Program.of(config, weights, library, max_rows)
    return torch_decoder if passes is None else NativeDecoder(passes, torch_decoder, max_rows)
