"""The paged KV pool: `[blocks, layers, block_tokens, row]`, so that a block is one run of bytes.

A row index addresses a token of layer 0; the rows of layer l lie `l * block_tokens` rows further, so one index tensor
serves all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protos.contract.errors import BadFrame
from workers.engine_api.pool_memory import Bytes, PoolMemory
from workers.engine_api.types import KvLayout
from workers.engines.torch.device_copies import DeviceCopies

Rows = npt.NDArray[np.int64]


class KvCache:
    """The pool and the addresses in it.

    Two blocks more than asked for: `num_blocks` stays zero, short block tables end with it; `scratch_block` takes the
    rows of padding, and nothing of a sequence is ever read from it.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: PoolMemory | None = None,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self._block_rows = layout.num_layers * layout.block_tokens
        row_values = layout.row_bytes // dtype.itemsize
        shape = ((num_blocks + 2) * self._block_rows, row_values)
        self._on_stored: Callable[[int], None] | None = None
        self._bytes: Bytes | None = None
        if device.type == "cpu":
            self._bytes = raw = (memory or PoolMemory()).allocate(shape[0] * layout.row_bytes)
            self._rows = torch.from_numpy(raw).view(dtype).view(shape)
        else:
            self._rows = torch.zeros(shape, dtype=dtype, device=device)
            self._copies = DeviceCopies(device, max(layout.group_bytes(group) for group in range(layout.num_groups)))

    @property
    def scratch_block(self) -> int:
        """The block that rows of padding are written to."""
        return self.num_blocks + 1

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.layout.block_tokens)

    def slots_of(self, block_table: Sequence[int], positions: Rows) -> Rows:
        """The row index of each position of a sequence."""
        tokens = self.layout.block_tokens
        first = int(positions[0]) // tokens
        blocks = np.asarray(block_table[first : int(positions[-1]) // tokens + 1], dtype=np.int64) * self._block_rows
        return blocks[positions // tokens - first] + positions % tokens

    @property
    def blocks(self) -> Tensor:
        """The pool, [num_blocks + 2, layers, block_tokens, row]."""
        return self._rows.view(-1, self.layout.num_layers, self.layout.block_tokens, self._rows.shape[-1])

    def store(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Writes one row for each slot."""
        self._layer(layer).index_copy_(0, slots, rows)
        self.stored(layer)

    def watch(self, on_stored: Callable[[int], None] | None) -> None:
        """From here on `on_stored` hears of each layer, on the computing thread, as soon as a pass stored its rows."""
        self._on_stored = on_stored

    def stored(self, layer: int) -> None:
        """A pass has written all its rows of this layer. For decoders that write into the pool themselves."""
        if self._on_stored is not None:
            self._on_stored(layer)

    def load(self, layer: int, blocks: Tensor) -> Tensor:
        """A copy of all rows of these blocks, [len(blocks), block_tokens, row]; the rows of one sequence if it is a table."""
        return self.blocks[:, layer].index_select(0, blocks)

    def read(self, block_id: int, group: int) -> memoryview:
        """The bytes of one layer group: a read-only view on a CPU, a copy from other devices."""
        start, size = self._span(block_id, group)
        if self._bytes is not None:
            return self._bytes[start : start + size].data.toreadonly()
        return self._copies.read(self._rows.view(torch.uint8).flatten()[start : start + size])

    def write(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        """Writes bytes into one layer group and returns a view of them, None on devices that the process cannot look into.

        Raises BadFrame, having written nothing, when they do not fit.
        """
        start, size = self._span(block_id, group)
        if offset_bytes < 0 or offset_bytes + data.nbytes > size:
            raise BadFrame(f"block {block_id} group {group}: {data.nbytes} bytes at {offset_bytes} do not fit its {size} bytes")
        start += offset_bytes
        if self._bytes is not None:
            written = self._bytes[start : start + data.nbytes]
            # numpy, unlike memoryview, lets other threads run while it copies.
            written[:] = np.frombuffer(data, dtype=np.uint8)
            return written.data.toreadonly()
        self._copies.write(self._rows.view(torch.uint8).flatten()[start : start + data.nbytes], data)
        return None

    def writable(self, block_id: int, group: int) -> memoryview | None:
        """The bytes of one layer group where they lie, None on devices that the process cannot look into."""
        start, size = self._span(block_id, group)
        return None if self._bytes is None else self._bytes[start : start + size].data

    def close(self) -> None:
        """Frees the pool. Views that are still held keep their memory."""
        self._bytes = None
        self._rows = self._rows[:0].clone()

    def _layer(self, layer: int) -> Tensor:
        return self._rows[layer * self.layout.block_tokens :]

    def _span(self, block_id: int, group: int) -> tuple[int, int]:
        layout = self.layout
        if not 0 <= block_id < self.num_blocks or not 0 <= group < layout.num_groups:
            raise BadFrame(f"there is no layer group {group} of block {block_id} in a pool of {self.num_blocks} blocks")
        layer_bytes = layout.block_tokens * layout.row_bytes
        start = block_id * layout.block_bytes + group * layout.layers_per_group * layer_bytes
        return start, layout.group_bytes(group)
