"""Computes the oracle model over a paged pool of real bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workers.batching.runner import OnGroups, Sampled, Slice
from workers.engine_api.clock import Clock, SystemClock
from workers.engine_api.pool_memory import PoolMemory
from workers.engine_api.types import KvLayout, ModelIdentity
from workers.engines.oracle.model import OracleModel, Words, chain_steps, draw, kv_rows, read_layers

_NO_TOKEN = Sampled(None)


class OracleRunner:
    """Implements `workers.batching.runner.Runner`.

    The pool is `[num_blocks, layers, block_tokens, row_bytes]`. The chain of a sequence is continued from the row before
    the slice as it lies in the pool, and every draw reads all rows through the block table: there is no state besides
    the bytes. A step lasts `prefill rows / prefill_tokens_per_s` plus `decode_step_s` if anything decodes, on `clock`;
    zero means no cost. Layer groups become final evenly over that time.
    """

    def __init__(
        self,
        model: OracleModel,
        *,
        num_blocks: int,
        block_tokens: int,
        prefill_tokens_per_s: float = 0.0,
        decode_step_s: float = 0.0,
        clock: Clock | None = None,
        memory: PoolMemory | None = None,
    ) -> None:
        self.model = model
        self._identity = model.identity
        self._layout = model.layout(block_tokens)
        self._bytes = (memory or PoolMemory()).allocate(num_blocks * self._layout.block_bytes)
        self._pool: Words = self._bytes.view("<u8").reshape(num_blocks, model.num_layers, block_tokens, model.words)
        self._by_layer = self._pool.reshape(num_blocks * model.num_layers, block_tokens * model.words)
        self._first: Words = np.array([model.key], dtype=np.uint64)  # the chain before position 0
        self._layer_index = np.arange(model.num_layers)[:, None]
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._decode_step_s = decode_step_s
        self._clock = clock or SystemClock()

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return len(self._pool)

    def run(self, batch: Sequence[Slice], on_groups: OnGroups | None = None) -> list[Sampled]:
        started_s = self._clock.now_s()
        single = [work for work in batch if work.count == 1]
        if single:
            self._write_single_rows(single)
        for work in batch:
            if work.count > 1:
                self._write_rows(work)
        drawn = [self._sample(work) if work.sample else _NO_TOKEN for work in batch]
        cost_s = self._cost_s(batch)
        if on_groups is not None:
            for group in range(self._layout.num_groups):
                self._wait_until_s(started_s + cost_s * group / self._layout.num_groups, cost_s)
                on_groups(group + 1)
        self._wait_until_s(started_s + cost_s, cost_s)
        return drawn

    def expert_visits(self) -> tuple[int, ...]:
        """None: there are no experts."""
        return ()

    def read_block(self, block_id: int, group: int) -> memoryview:
        start, size = self._span(block_id, group)
        return self._bytes[start : start + size].data.toreadonly()

    def write_block(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        start, _ = self._span(block_id, group)
        start += offset_bytes
        written = self._bytes[start : start + data.nbytes]
        written[:] = np.frombuffer(data, dtype=np.uint8)
        return written.data.toreadonly()

    def writable_group(self, block_id: int, group: int) -> memoryview | None:
        start, size = self._span(block_id, group)
        return self._bytes[start : start + size].data

    def close(self) -> None:
        """Nothing to free: the pool goes with the runner, and views of it stay valid."""

    def _span(self, block_id: int, group: int) -> tuple[int, int]:
        size = self._layout.group_bytes(group)
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} of {self.num_blocks}")
        return block_id * self._layout.block_bytes + group * self._layout.group_bytes(0), size

    def _write_single_rows(self, batch: Sequence[Slice]) -> None:
        """One row of each sequence, all at once."""
        size, key = self._layout.block_tokens, self.model.key
        starts = [work.start for work in batch]
        before = np.array([work.block_table[(p - 1) // size] if p else 0 for work, p in zip(batch, starts, strict=True)])
        target = np.array([work.block_table[p // size] for work, p in zip(batch, starts, strict=True)])
        positions = np.array(starts, dtype=np.uint64)
        offsets = np.array(starts)
        chain = np.where(offsets > 0, self._pool[before, 0, (offsets - 1) % size, 0], self._first)
        chain = chain + chain_steps(key, [work.tokens[work.start] for work in batch], positions)
        self._pool[target, :, offsets % size] = kv_rows(self.model, chain)

    def _write_rows(self, work: Slice) -> None:
        size, start, stop = self._layout.block_tokens, work.start, work.start + work.count
        chain = chain_steps(self.model.key, work.tokens[start:stop], np.arange(start, stop, dtype=np.uint64))
        chain[:1] += self._pool[work.block_table[(start - 1) // size], 0, (start - 1) % size, :1] if start else self._first
        rows = kv_rows(self.model, np.cumsum(chain, dtype=np.uint64))
        positions = np.arange(start, stop)
        blocks = np.array(work.block_table)[positions // size]
        self._pool[blocks, :, positions % size] = rows

    def _sample(self, work: Slice) -> Sampled:
        rows = work.start + work.count
        used = np.array(work.block_table[: -(-rows // self._layout.block_tokens)]) * self.model.num_layers
        layers = self._by_layer.take(used + self._layer_index, axis=0).reshape(self.model.num_layers, -1)
        fold = read_layers(layers[:, : rows * self.model.words])
        return Sampled(draw(self.model.key, fold, work.sampling, work.output_index))

    def _cost_s(self, batch: Sequence[Slice]) -> float:
        if not self._prefill_tokens_per_s and not self._decode_step_s:
            return 0.0
        # A slice decodes when it feeds back one sampled token and nothing of the prompt.
        decodes = sum(work.count == 1 and work.start >= work.num_prompt_tokens for work in batch)
        cost_s = self._decode_step_s if decodes else 0.0
        if self._prefill_tokens_per_s:
            cost_s += (sum(work.count for work in batch) - decodes) / self._prefill_tokens_per_s
        return cost_s

    def _wait_until_s(self, at_s: float, cost_s: float) -> None:
        """Waits until the step has lasted as long as it costs; what the arithmetic took counts."""
        if cost_s:
            self._clock.wait_s(at_s - self._clock.now_s())
