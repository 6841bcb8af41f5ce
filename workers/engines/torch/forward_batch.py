"""One step as tensors: all rows of all slices side by side, and where in the pool each sequence lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.batching.runner import Slice
from workers.engines.torch.kv_cache import KvCache, Rows

_WORD = 8  # bytes: every array of an upload starts on such a border
GROUP_ROWS = 32_768  # KV rows, padding included, that a decode group of more than one sequence gathers at most
_FREE_PADDING_TOKENS = 128  # padding that costs less than another group's kernel calls


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """A slice of several rows: `[first, first + count)` of the batch, at positions from `start` on."""

    first: int
    count: int
    start: int
    block_table: Tensor  # [blocks], int32; blocks in logical order, enough for start + count tokens


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows of similar length, so that one rectangle of blocks holds them with little padding."""

    rows: Tensor | None  # [b], rows of the batch; None when the group is all decode rows in order
    block_tables: Tensor  # [b, widest of the group], int32
    lengths: Tensor  # [b], int32
    shortest: int  # tokens that every row of the group sees at least


@dataclass(frozen=True, slots=True)
class DecodePart:
    """The leading slices of one row each: rows `[0, B)` of the batch."""

    block_tables: Tensor  # [B, widest], int32; short tables end with the pool's block of zeros
    lengths: Tensor  # [B], int32; tokens that each row sees, its own included
    lengths_list: tuple[int, ...]
    groups: tuple[DecodeGroup, ...]  # every row in exactly one

    @property
    def count(self) -> int:
        """B."""
        return self.lengths.shape[0]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What a decoder computes in one pass."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # rows of the pool that the batch writes, [T]
    prefills: tuple[PrefillPart, ...]
    decodes: DecodePart | None
    sample_rows: Tensor | None  # rows of the batch whose logits are wanted, [S]; None when all are


class Upload:
    """Arrays that go to the device in one transfer, from pinned memory where the device is not the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrays: list[npt.NDArray[np.int64] | npt.NDArray[np.int32]] = []

    def add(self, array: npt.NDArray[np.int64] | npt.NDArray[np.int32]) -> int:
        """Takes an array; returns its place among those of `send`."""
        self._arrays.append(array)
        return len(self._arrays) - 1

    def send(self) -> list[Tensor]:
        """The arrays on the device, in the order in which they were added. The host does not wait for the transfer."""
        starts = np.cumsum([0, *(-(-array.nbytes // _WORD) * _WORD for array in self._arrays)])
        packed = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        view = packed.numpy()
        for start, array in zip(starts, self._arrays, strict=False):
            view[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        there = packed.to(self._device, non_blocking=True)
        found = []
        for start, array in zip(starts, self._arrays, strict=False):
            dtype = torch.int64 if array.dtype == np.int64 else torch.int32
            found.append(there[int(start) : int(start) + array.nbytes].view(dtype).view(array.shape))
        return found


def build_batch(slices: Sequence[Slice], cache: KvCache, device: torch.device) -> ForwardBatch:
    """Lays out the slices in order. The batcher puts decodes first; a chunk of one row behind a longer one is a prefill."""
    upload = Upload(device)
    token_ids: list[int] = []
    positions: list[Rows] = []
    slots: list[Rows] = []
    prefills: list[tuple[int, Slice, int]] = []
    decodes: list[Slice] = []
    sample_rows: list[int] = []
    for piece in slices:
        first, end = len(token_ids), piece.start + piece.count
        token_ids.extend(piece.tokens[piece.start : end])
        rows = np.arange(piece.start, end, dtype=np.int64)
        positions.append(rows)
        slots.append(cache.slots_of(piece.block_table, rows))
        if piece.count == 1 and not prefills:
            decodes.append(piece)
        else:
            table = np.asarray(piece.block_table[: cache.blocks_for(end)], dtype=np.int32)
            prefills.append((first, piece, upload.add(table)))
        if piece.sample:
            sample_rows.append(len(token_ids) - 1)
    for array in (np.asarray(token_ids, dtype=np.int64), np.concatenate(positions), np.concatenate(slots)):
        upload.add(array)
    upload.add(np.asarray(sample_rows, dtype=np.int64))
    groups = _add_decodes(decodes, cache, upload) if decodes else None
    tensors = upload.send()
    rows_at = len(prefills)
    return ForwardBatch(
        token_ids=tensors[rows_at],
        positions=tensors[rows_at + 1],
        slots=tensors[rows_at + 2],
        prefills=tuple(PrefillPart(first, piece.count, piece.start, tensors[at]) for first, piece, at in prefills),
        decodes=None if groups is None else _decode_part(decodes, groups, tensors[rows_at + 4 :], cache),
        sample_rows=None if len(sample_rows) == len(token_ids) else tensors[rows_at + 3],
    )


def length_groups(lengths: Sequence[int], block_tokens: int) -> list[list[int]]:
    """Rows by similar length, every row in one group.

    Of a group's rectangle at most a quarter is padding, or 128 tokens per row, counted in whole blocks; and a group of
    several rows holds at most GROUP_ROWS KV rows, so the padding of a step is bounded by its contexts.
    """
    groups: list[list[int]] = []
    widest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        blocks = -(-lengths[row] // block_tokens)
        near = 4 * blocks >= 3 * widest or (widest - blocks) * block_tokens <= _FREE_PADDING_TOKENS
        if groups and near and (len(groups[-1]) + 1) * widest * block_tokens <= GROUP_ROWS:
            groups[-1].append(row)
        else:
            groups.append([row])
            widest = blocks
    return groups


def _add_decodes(decodes: list[Slice], cache: KvCache, upload: Upload) -> list[list[int]]:
    """Adds tables and lengths, then the rows of each group when there are several. Returns the groups."""
    lengths = np.array([piece.start + 1 for piece in decodes], dtype=np.int32)
    tables = np.full((len(decodes), cache.blocks_for(int(lengths.max()))), cache.num_blocks, dtype=np.int32)
    for row, piece in enumerate(decodes):
        used = cache.blocks_for(piece.start + 1)
        tables[row, :used] = piece.block_table[:used]
    upload.add(tables)
    upload.add(lengths)
    groups = length_groups(lengths.tolist(), cache.layout.block_tokens)
    if len(groups) > 1:
        for group in groups:
            upload.add(np.asarray(group, dtype=np.int64))
    return groups


def _decode_part(decodes: list[Slice], groups: list[list[int]], tensors: list[Tensor], cache: KvCache) -> DecodePart:
    tables, lengths = tensors[:2]
    known = tuple(piece.start + 1 for piece in decodes)
    if len(groups) == 1:
        return DecodePart(tables, lengths, known, (DecodeGroup(None, tables, lengths, min(known)),))
    parts = []
    for rows, members in zip(tensors[2:], groups, strict=True):
        mine = [known[row] for row in members]
        width = cache.blocks_for(max(mine))
        parts.append(DecodeGroup(rows, tables[rows, :width], lengths[rows], min(mine)))
    return DecodePart(tables, lengths, known, tuple(parts))
