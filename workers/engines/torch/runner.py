"""The torch side of the batcher: a decoder, its paged pool, and one forward pass for a ragged batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from workers.batching.runner import OnGroups, Sampled, Slice
from workers.engine_api.pool_memory import PoolMemory
from workers.engine_api.types import KvLayout, ModelIdentity
from workers.engines.torch.config import DecoderConfig
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.models.decoder import Decoder
from workers.engines.torch.sampler import Sampler
from workers.engines.torch.steps import EagerSteps, Steps


def layout_of(config: DecoderConfig, dtype: torch.dtype, block_tokens: int) -> KvLayout:
    """How the KV of a model lies in blocks."""
    return KvLayout(
        block_tokens=block_tokens,
        num_layers=config.num_layers,
        row_bytes=config.kv_row_values * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
        name=config.kv_layout_name,
    )


class TorchRunner:
    """Implements workers.batching.runner.Runner. `run` belongs to one thread; blocks may be read and written beside it."""

    def __init__(
        self,
        *,
        decoder: Decoder,
        identity: ModelIdentity,
        layout: KvLayout,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        steps: Steps | None = None,
        memory: PoolMemory | None = None,
    ) -> None:
        self._decoder = decoder
        self._steps = steps or EagerSteps()
        self._identity = identity
        self._device = device
        self._cache = KvCache(layout, num_blocks, dtype, device, memory)
        self._sampler = Sampler()
        self.before_forward: Callable[[Sequence[Slice]], None] | None = None  # hears of every batch that is computed

    @property
    def identity(self) -> ModelIdentity:
        """The model; constant."""
        return self._identity

    @property
    def layout(self) -> KvLayout:
        """How KV bytes lie in a block; constant."""
        return self._cache.layout

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self._cache.num_blocks

    def run(self, batch: Sequence[Slice], on_groups: OnGroups | None = None) -> list[Sampled]:
        """See Runner.run. A slice that cannot be computed fails alone."""
        results = [Sampled(None, self._refusal(piece)) for piece in batch]
        live = [index for index, result in enumerate(results) if result.error is None]
        if not live:
            return results
        pieces = [batch[index] for index in live]
        if self.before_forward is not None:
            self.before_forward(pieces)
        with torch.inference_mode():
            logits = self._logits(pieces, on_groups)
            drawn = [index for index in live if batch[index].sample]
            if drawn:
                tokens = self._sampler.sample(logits, [batch[index] for index in drawn])
                for index, token in zip(drawn, tokens, strict=True):
                    results[index] = token
        return results

    def expert_visits(self) -> tuple[int, ...]:
        """See Runner.expert_visits."""
        return self._decoder.expert_visits()

    def read_block(self, block_id: int, group: int) -> memoryview:
        """See Runner.read_block."""
        return self._cache.read(block_id, group)

    def write_block(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        """See Runner.write_block."""
        return self._cache.write(block_id, group, offset_bytes, data)

    def writable_group(self, block_id: int, group: int) -> memoryview | None:
        """See Runner.writable_group."""
        return self._cache.writable(block_id, group)

    def close(self) -> None:
        """Frees the pool. Idempotent."""
        self._cache.close()

    def _logits(self, pieces: Sequence[Slice], on_groups: OnGroups | None) -> torch.Tensor:
        if on_groups is None or not self._steps.is_one_pass:
            return self._steps.logits(self._decoder, pieces, self._cache, self._device)
        tell, layout = on_groups, self.layout

        def stored(layer: int) -> None:
            if (layer + 1) % layout.layers_per_group == 0 or layer + 1 == layout.num_layers:
                tell(layer // layout.layers_per_group + 1)

        self._cache.watch(stored)
        try:
            return self._steps.logits(self._decoder, pieces, self._cache, self._device)
        finally:
            self._cache.watch(None)

    def _refusal(self, piece: Slice) -> str | None:
        end = piece.start + piece.count
        if piece.count < 1 or piece.start < 0 or end > len(piece.tokens):
            return f"rows [{piece.start}, {end}) of {len(piece.tokens)} tokens"
        if end > len(piece.block_table) * self.layout.block_tokens:
            return f"{len(piece.block_table)} blocks do not hold {end} rows"
        if end > self._identity.context_tokens:
            return f"position {end - 1} is beyond the context of {self._identity.context_tokens} tokens"
        fed = piece.tokens[piece.start : end]
        if min(fed) < 0 or max(fed) >= self._identity.vocab_size:
            return f"a token id is outside the vocabulary of {self._identity.vocab_size}"
        return None
