"""A forward pass as a list of operations over fixed buffers, built once and run for every step.

Narrow steps (few rows, all of them decodes) run as one native call. Wide ones run operation by operation: matrix products by
torch, everything between them natively. One list serves both, so both compute the same model.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.native.library import Library, threads

_WORDS = 20  # of one operation, its code included


class Code(IntEnum):
    """Operations of src/program.h; their operands are described beside the C++ functions."""

    EMBED = 1
    NORM = 2
    LINEAR = 3
    ROPE_TABLES = 4
    ROTATE_GQA = 5
    ATTEND = 6
    GATE = 7
    SPLIT_LATENT = 8
    ROTATE_MLA = 9
    HEADS_LINEAR = 10
    ROUTE = 11
    EXPERTS = 12


class NativeBatch(ctypes.Structure):
    """struct Batch of src/program.h."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("table_width", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
    ]


Wide = Callable[[ForwardBatch, KvCache, int], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One operation, and what does its work in a wide step instead; None: itself."""

    words: bytes
    wide: Wide | None


class Program:
    """Operations in order. The tensors whose addresses they hold are kept alive."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._steps: list[Step] = []
        self._kept: list[Tensor] = []
        self._narrow: ctypes.Array[ctypes.c_char] | None = None

    def add(self, code: Code, *operands: int | float | Tensor | None, wide: Wide | None = None) -> None:
        """Appends an operation. Tensors stand for their address and must be contiguous; floats travel as doubles."""
        words = [struct.pack("<q", code)]
        for operand in operands:
            if isinstance(operand, Tensor):
                assert operand.is_contiguous() and operand.device.type == "cpu"
                self._kept.append(operand)
                words.append(struct.pack("<q", operand.data_ptr()))
            elif isinstance(operand, float):
                words.append(struct.pack("<d", operand))
            else:
                words.append(struct.pack("<q", operand or 0))
        assert len(words) <= _WORDS
        self._steps.append(Step(b"".join(words).ljust(8 * _WORDS, b"\0"), wide))
        self._narrow = None

    def run_narrow(self, batch: ForwardBatch, cache: KvCache) -> None:
        """All operations in one call."""
        if self._narrow is None:
            code = b"".join(step.words for step in self._steps)
            self._narrow = ctypes.create_string_buffer(code, len(code))
        native = native_batch(batch, cache)
        self._library.run_program(self._narrow, len(self._steps), ctypes.byref(native), threads())

    def run_wide(self, batch: ForwardBatch, cache: KvCache, rows: int) -> None:
        """Operation by operation, for the first `rows` rows of the buffers."""
        native = native_batch(batch, cache)
        native.rows = rows
        for step in self._steps:
            if step.wide is None:
                self._library.run_program(step.words, 1, ctypes.byref(native), threads())
            else:
                step.wide(batch, cache, rows)

    def run_one(self, index: int, batch: ForwardBatch, cache: KvCache, rows: int) -> None:
        """One operation of the list, natively, for the first `rows` rows."""
        native = native_batch(batch, cache)
        native.rows = rows
        self._library.run_program(self._steps[index].words, 1, ctypes.byref(native), threads())

    def __len__(self) -> int:
        return len(self._steps)


def native_batch(batch: ForwardBatch, cache: KvCache) -> NativeBatch:
    """The addresses of a batch that lies on the CPU; it must outlive the call."""
    decodes = batch.decodes
    return NativeBatch(
        rows=batch.token_ids.shape[0],
        token_ids=batch.token_ids.data_ptr(),
        positions=batch.positions.data_ptr(),
        slots=batch.slots.data_ptr(),
        block_tables=0 if decodes is None else decodes.block_tables.data_ptr(),
        table_width=0 if decodes is None else decodes.block_tables.shape[1],
        lengths=0 if decodes is None else decodes.lengths.data_ptr(),
        pool=cache.blocks.data_ptr(),
    )


class Buffers:
    """Scratch of a program, for at most `max_rows` rows, in memory that the system hands out page by page when touched."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows

    def of(self, width: int, dtype: torch.dtype) -> Tensor:
        """[max_rows, width]"""
        raw = np.zeros(self.max_rows * width * dtype.itemsize, dtype=np.uint8)
        return torch.from_numpy(raw).view(dtype).view(self.max_rows, width)
