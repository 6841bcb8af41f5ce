"""Attention of prompt chunks by the native kernel: tile by tile over the context, so that no buffer grows with it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from workers.engines.torch.forward_batch import PrefillPart
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.native.library import Library, threads

TILE_TOKENS = 2048  # of context: K and V of all heads of the released model are 32 MiB in bf16

_POINTERS = frozenset(("q", "k", "shared", "v", "max", "sum", "acc", "out", "packed"))
_NAMES = (
    *("q", "q_row", "q_head", "count", "q_start", "heads", "group", "k", "k_row", "k_head", "k_dim", "shared", "shared_row"),
    *(
        "shared_dim",
        "v",
        "v_row",
        "v_head",
        "v_dim",
        "start",
        "length",
        "window",
        "max",
        "sum",
        "acc",
        "out",
        "packed",
        "first",
    ),
)


class FlashTile(ctypes.Structure):
    """struct FlashTile of src/flash_prefill.h."""

    _fields_ = [
        *((name, ctypes.c_void_p if name in _POINTERS else ctypes.c_int64) for name in _NAMES),
        ("scale", ctypes.c_double),
    ]


class FlashScratch:
    """Memory that calls share, grown to the largest of them."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def of(self, name: str, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """At least `count` values, with whatever an earlier call left in them."""
        held = self._held.get(name)
        if held is None or held.numel() < count:
            held = self._held[name] = torch.empty(count, dtype=dtype)
        return held


class FlashPrefill:
    """Chunks of the two attentions. q: [count, N, D] bf16, contiguous per row; out: [count, N, V]."""

    def __init__(self, library: Library, tile_tokens: int = TILE_TOKENS) -> None:
        self._library = library
        self._tile_tokens = tile_tokens
        self._scratch = FlashScratch()

    @staticmethod
    def fits(key_dim: int, shared_dim: int, value_dim: int) -> bool:
        """Whether the kernel handles heads of these widths."""
        return key_dim % 2 == 0 and shared_dim % 2 == 0 and value_dim % 16 == 0

    def gqa(self, q: Tensor, out: Tensor, layer: int, cache: KvCache, part: PrefillPart, kv_heads: int, window: int) -> None:
        """Grouped-query attention of one chunk; window 0 is none."""
        dim = q.shape[2]
        for first, start, rows in self._tiles(cache, layer, part, window):
            tile = self._tile(first, q, part, start, rows, kv_heads, dim, 0, dim)
            tile.k, tile.k_row, tile.k_head, tile.k_dim = rows.data_ptr(), rows.shape[1], dim, dim
            tile.v, tile.v_row, tile.v_head = rows.data_ptr() + kv_heads * dim * 2, rows.shape[1], dim
            tile.window = window
            self._run(tile, out, part)

    def mla(self, q: Tensor, out: Tensor, layer: int, cache: KvCache, part: PrefillPart, joint: Tensor, rank: int) -> None:
        """Latent attention of one chunk. joint: [N * (O + V), R]; keys and values are rebuilt for one tile at a time."""
        heads, value_dim = q.shape[1], out.shape[2]
        rope = cache.blocks.shape[-1] - rank
        nope = q.shape[2] - rope
        for first, start, rows in self._tiles(cache, layer, part, 0):
            rebuilt = self._scratch.of("rebuilt", self._tile_tokens * joint.shape[0], torch.bfloat16)
            rebuilt = rebuilt[: rows.shape[0] * joint.shape[0]].view(rows.shape[0], joint.shape[0])
            torch.mm(rows[:, :rank], joint.t(), out=rebuilt)
            tile = self._tile(first, q, part, start, rows, heads, nope, rope, value_dim)
            tile.k, tile.k_row, tile.k_head, tile.k_dim = rebuilt.data_ptr(), joint.shape[0], nope + value_dim, nope
            tile.shared, tile.shared_row, tile.shared_dim = rows.data_ptr() + rank * 2, rows.shape[1], rope
            tile.v, tile.v_row, tile.v_head = rebuilt.data_ptr() + nope * 2, joint.shape[0], nope + value_dim
            self._run(tile, out, part)

    def _tiles(self, cache: KvCache, layer: int, part: PrefillPart, window: int) -> Iterator[tuple[bool, int, Tensor]]:
        tokens = cache.layout.block_tokens
        step = max(1, self._tile_tokens // tokens)
        end = part.start + part.count
        first = max(0, part.start - window + 1) // tokens if window else 0
        row_values = cache.blocks.shape[-1]
        held = self._scratch.of("context", step * tokens * row_values, torch.bfloat16)
        pool = cache.blocks[:, layer]
        for block in range(first, -(-end // tokens), step):
            table = part.block_table[block : block + step]
            rows = held[: table.shape[0] * tokens * row_values].view(table.shape[0], tokens, row_values)
            torch.index_select(pool, 0, table, out=rows)
            start = block * tokens
            yield block == first, start, rows.view(-1, row_values)[: end - start]

    def _tile(
        self,
        first: bool,
        q: Tensor,
        part: PrefillPart,
        start: int,
        rows: Tensor,
        key_heads: int,
        own: int,
        shared: int,
        value_dim: int,
    ) -> FlashTile:
        count, heads, length = q.shape[0], q.shape[1], rows.shape[0]
        blocks = -(-length // 64)
        packed = self._scratch.of("packed", key_heads * blocks * 32 * (own + shared + value_dim), torch.int32)
        return FlashTile(
            q=q.data_ptr(),
            q_row=q.stride(0),
            q_head=q.stride(1),
            count=count,
            q_start=part.start,
            heads=heads,
            group=heads // key_heads,
            v_dim=value_dim,
            start=start,
            length=length,
            max=self._scratch.of("max", heads * count).data_ptr(),
            sum=self._scratch.of("sum", heads * count).data_ptr(),
            acc=self._scratch.of("acc", heads * count * value_dim).data_ptr(),
            packed=packed.data_ptr(),
            first=int(first),
            scale=q.shape[2] ** -0.5,
        )

    def _run(self, tile: FlashTile, out: Tensor, part: PrefillPart) -> None:
        if tile.start + tile.length == part.start + part.count:
            tile.out = out.data_ptr()
        self._library.flash_tile(ctypes.byref(tile), threads())
