"""Reading a run of rows and columns of a stored matrix, compressed or decoded, without holding more of it than a chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engines.torch.number_formats import CHUNK_VALUES, NVFP4_BLOCK, decode_rows
from workers.engines.torch.stored_tensors import Entry, Piece, Shards

WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows and columns of one stored matrix; `index` is its place when the tensor holds a stack of matrices.

    The parts of a block are tensors with one row per row of the block: values, then scales. A scale of the whole matrix is
    repeated for each row, so that blocks of several matrices can lie below each other.
    """

    piece: Piece
    index: int | None
    rows: range
    columns: range

    @property
    def kind(self) -> str:
        """The format; see Piece."""
        return self.piece.kind

    @property
    def group(self) -> int:
        """How many neighbouring columns share a byte or a scale."""
        values = self.piece.entries[0]
        if self.kind == "int4":
            return 2 * values.shape[-1] // self.piece.entries[1].shape[-1]
        return NVFP4_BLOCK if self.kind == "nvfp4" else 1

    @property
    def aligned(self) -> bool:
        """Whether its columns begin and end with a group, so that it can be kept compressed."""
        return self.columns.start % self.group == 0 and self.columns.stop % self.group == 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of the whole matrix in the files."""
        stack = 1 if self.index is None else self.piece.entries[0].shape[0]
        return self.piece.stored_bytes // stack

    def copy_parts(self, shards: Shards, targets: Sequence[Tensor], first_row: int) -> None:
        """Copies the parts into rows of the targets. The block is aligned."""
        rows = slice(first_row, first_row + len(self.rows))
        for target, scales in zip(targets[1:], self._scales(shards, self.columns), strict=True):
            target[rows].copy_(scales)
        for start, values in self._values(shards, self.columns):
            at = first_row + start
            targets[0][at : at + values.shape[0]].copy_(values)

    def decode(self, shards: Shards, target: Tensor, first_row: int) -> None:
        """Writes the values into rows of the target, [*, columns], chunk by chunk, in its dtype on its device."""
        group = self.group
        start, stop = self.columns.start // group * group, -(-self.columns.stop // group) * group
        scales = [scale.to(target.device) for scale in self._scales(shards, range(start, stop))]
        wanted = slice(self.columns.start - start, self.columns.stop - start)
        for row, values in self._values(shards, range(start, stop)):
            count, at = values.shape[0], first_row + row
            parts = [values.to(target.device), *(scale[row : row + count] for scale in scales)]
            target[at : at + count].copy_(decode_rows(self.kind, parts)[:, wanted])

    def _values(self, shards: Shards, columns: range) -> Iterator[tuple[int, Tensor]]:
        """Views of the values in chunks of rows, each with its first row within the block."""
        per_byte = 2 if self.kind in ("int4", "nvfp4") else 1
        count = max(1, CHUNK_VALUES // max(len(columns), 1))
        for start in range(0, len(self.rows), count):
            rows = self.rows[start : start + count]
            across = range(columns.start // per_byte, columns.stop // per_byte)
            yield start, self._at(shards, self.piece.entries[0], rows, across)

    def _scales(self, shards: Shards, columns: range) -> list[Tensor]:
        """The scales of the rows, as copies: values and scales may lie in different files."""
        scales = self.piece.entries[1:]
        if self.kind == "int8":
            return [self._at(shards, scales[0], self.rows).clone()]
        found = []
        if self.kind in ("int4", "nvfp4"):
            groups = range(columns.start // self.group, columns.stop // self.group)
            found, scales = [self._at(shards, scales[0], self.rows, groups).clone()], scales[1:]
        for entry in scales:
            of_matrices = shards.view(entry).float().reshape(-1)
            found.append(of_matrices[self.index or 0].clone().expand(len(self.rows)))
        return found

    def _at(self, shards: Shards, entry: Entry, rows: range, *columns: range) -> Tensor:
        where = [slice(run.start, run.stop) for run in (rows, *columns)]
        return shards.view(entry, *where) if self.index is None else shards.view(entry, self.index, *where)


def block_of(piece: Piece, index: int | None, rows: slice, columns: slice) -> Block:
    """The block of a stored matrix at these rows and columns, which lie within it."""
    return Block(piece, index, range(piece.entries[0].shape[-2])[rows], range(piece.width)[columns])


def empty_parts(block: Block, num_rows: int, device: torch.device) -> list[Tensor]:
    """Room for the parts of so many rows of this block's format and columns."""
    width, per_row = len(block.columns), torch.float32
    if block.kind == "int8":
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((num_rows, width), torch.int8), ((num_rows,), per_row)]
    elif block.kind == "fp8":
        shapes = [((num_rows, width), torch.float8_e4m3fn), ((num_rows,), per_row)]
    else:
        groups = (num_rows, width // block.group)
        shapes = [((num_rows, width // 2), torch.uint8), (groups, torch.float32)]
        if block.kind == "nvfp4":
            shapes = [shapes[0], (groups, torch.float8_e4m3fn), ((num_rows,), per_row)]
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
