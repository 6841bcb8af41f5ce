"""Decode steps of few shapes, so that a GPU can replay a captured graph instead of launching every kernel.

A step of rows that decode is filled up to a bucket of batch size and table width in buffers that never move. Rows of padding
read the pool's block of zeros and write to its scratch block. On a GPU the pass over a bucket is captured once and replayed;
elsewhere the same buffers go through the decoder directly. Everything else runs eagerly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.batching.runner import Slice
from workers.engines.torch.forward_batch import GROUP_ROWS, DecodeGroup, DecodePart, ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.models.decoder import Decoder
from workers.engines.torch.steps import EagerSteps

MAX_BATCH = 256  # beyond it the launches are small beside the work
MAX_GRAPHS = 64  # captured at a time; the one unused longest goes first
_SMALL_BATCHES = (1, 2, 4)
_BATCH_STEP = 8
_NARROWEST_BLOCKS = 4
_MOST_PADDING = 3  # times the real KV rows


@dataclass(frozen=True, slots=True)
class Bucket:
    """The shape of a padded step: rows, and blocks of each row's table."""

    batch: int
    blocks: int


def bucket_of(lengths: Sequence[int], block_tokens: int) -> Bucket | None:
    """The smallest bucket that holds decode rows of these lengths; None when a graph does not pay.

    Batches are 1, 2, 4 and multiples of 8 up to MAX_BATCH; tables powers of two from 4 blocks. A bucket whose rectangle
    is mostly padding is refused, unless it is small: attention reads the padding.
    """
    size = len(lengths)
    if not 1 <= size <= MAX_BATCH:
        return None
    batch = next((one for one in _SMALL_BATCHES if one >= size), -(-size // _BATCH_STEP) * _BATCH_STEP)
    widest = -(-max(lengths) // block_tokens)
    blocks = max(_NARROWEST_BLOCKS, 1 << (widest - 1).bit_length())
    rows = batch * blocks * block_tokens
    if rows > GROUP_ROWS and rows > _MOST_PADDING * sum(lengths):
        return None
    return Bucket(batch, blocks)


class StaticDecode:
    """The buffers of one bucket: one host array, one transfer, one ForwardBatch of views that stay where they are."""

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        rows, table = bucket.batch, bucket.batch * bucket.blocks
        longs, ints = 3 * rows * 8, (table + rows) * 4
        self._host = torch.empty(longs + ints, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._there = self._host if device.type == "cpu" else torch.empty_like(self._host, device=device)
        host = self._host.numpy()
        self._longs: npt.NDArray[np.int64] = host[:longs].view(np.int64).reshape(3, rows)
        self._tables: npt.NDArray[np.int32] = host[longs : longs + 4 * table].view(np.int32).reshape(rows, bucket.blocks)
        self._lengths: npt.NDArray[np.int32] = host[longs + 4 * table :].view(np.int32)
        token_ids, positions, slots = self._there[:longs].view(torch.int64).view(3, rows).unbind(0)
        tables = self._there[longs : longs + 4 * table].view(torch.int32).view(rows, bucket.blocks)
        lengths = self._there[longs + 4 * table :].view(torch.int32)
        groups = (DecodeGroup(None, tables, lengths, 0),)
        self.batch = ForwardBatch(token_ids, positions, slots, (), DecodePart(tables, lengths, (), groups), None)

    def fill(self, slices: Sequence[Slice], cache: KvCache) -> None:
        """Lays out rows of one token each. The previous step's tokens must have been fetched: its transfer is over then."""
        scratch = int(cache.slots_of((cache.scratch_block,), np.zeros(1, dtype=np.int64))[0])
        self._longs[:] = [[0], [0], [scratch]]
        self._tables.fill(cache.num_blocks)
        self._lengths.fill(1)
        for row, piece in enumerate(slices):
            at = np.array([piece.start], dtype=np.int64)
            self._longs[:, row] = (piece.tokens[piece.start], piece.start, cache.slots_of(piece.block_table, at)[0])
            used = cache.blocks_for(piece.start + 1)
            self._tables[row, :used] = piece.block_table[:used]
            self._lengths[row] = piece.start + 1
        if self._there is not self._host:
            self._there.copy_(self._host, non_blocking=True)


class GraphedSteps:
    """Implements Steps for one decoder and one pool."""

    is_one_pass = True  # prompts run without a graph

    def __init__(self) -> None:
        self._eager = EagerSteps()
        self._passes: OrderedDict[Bucket, _Pass] = OrderedDict()

    def logits(self, decoder: Decoder, slices: Sequence[Slice], cache: KvCache, device: torch.device) -> Tensor:
        """See Steps."""
        bucket = None
        if all(piece.count == 1 for piece in slices):
            bucket = bucket_of([piece.start + 1 for piece in slices], cache.layout.block_tokens)
        if bucket is None:
            return self._eager.logits(decoder, slices, cache, device)
        found = self._pass_of(bucket, device)
        logits = found.run(decoder, slices, cache)
        wanted = [row for row, piece in enumerate(slices) if piece.sample]
        if len(wanted) == len(slices):
            return logits[: len(slices)]
        return logits.index_select(0, torch.tensor(wanted, dtype=torch.int64).to(device, non_blocking=True))

    def _pass_of(self, bucket: Bucket, device: torch.device) -> _Pass:
        if bucket not in self._passes:
            if len(self._passes) == MAX_GRAPHS:
                self._passes.popitem(last=False)
            self._passes[bucket] = _Pass(StaticDecode(bucket, device), device)
        self._passes.move_to_end(bucket)
        return self._passes[bucket]


class _Pass:
    """One bucket's pass; on a GPU captured at its first use."""

    def __init__(self, static: StaticDecode, device: torch.device) -> None:
        self._static = static
        self._captures = device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def run(self, decoder: Decoder, slices: Sequence[Slice], cache: KvCache) -> Tensor:
        """The logits of all rows of the bucket; the next run overwrites them."""
        self._static.fill(slices, cache)
        if not self._captures:
            return decoder.forward(self._static.batch, cache)
        if self._graph is None:
            self._capture(decoder, cache)
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        return self._logits

    def _capture(self, decoder: Decoder, cache: KvCache) -> None:
        # Libraries set themselves up on their first call, which a capture does not allow. Running twice writes equal rows.
        aside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            decoder.forward(self._static.batch, cache)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = decoder.forward(self._static.batch, cache)
        self._graph = graph
