"""Attention by tiles: the geometry against its definition, the results against reference.py, and what it holds at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.torch_models import GREEDY
from workers.batching.runner import Slice
from workers.engine_api.types import KvLayout
from workers.engines.torch import reference
from workers.engines.torch.attention.torch_backend import TorchAttention
from workers.engines.torch.forward_batch import GROUP_ROWS, ForwardBatch, build_batch, length_groups
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers import mla, partial
from workers.engines.torch.layers.mla import LatentHeads, absorbed_is_cheaper
from workers.engines.torch.layers.partial import Merged, attend_part, attend_plainly, kernel_for
from workers.engines.torch.layers.tiles import TileSizes, key_tiles, row_runs

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("seed", range(60))
def test_runs_of_rows_over_tiles_of_keys_cover_what_each_row_sees(seed: int) -> None:
    rng = random.Random(seed)
    start, count = rng.randint(0, 40), rng.randint(1, 30)
    window = rng.choice((None, 1, 2, 5, 17, 100))
    sizes = TileSizes(rng.randint(1, 20), rng.randint(1, 9))
    seen: dict[int, list[int]] = {row: [] for row in range(start, start + count)}
    held = 0
    for tile in key_tiles(start, count, window, sizes):
        held += tile.end - tile.first
        assert 0 < tile.end - tile.first <= sizes.context_tokens
        for run in row_runs(tile, start, count, window, sizes):
            for row in range(run.first, run.end):
                visible = [key for key in range(tile.first, tile.end) if key <= row and (window is None or key > row - window)]
                assert visible
                if run.sight == "full":
                    assert visible == list(range(tile.first, tile.end))
                elif run.sight == "causal":
                    assert (run.first, run.end) == (tile.first, tile.end)
                    assert visible == list(range(tile.first, row + 1))
                seen[row] += visible
    for row, keys in seen.items():
        assert keys == list(range(0 if window is None else max(0, row - window + 1), row + 1))
    if window is not None:
        assert held <= count + window - 1  # work is bounded by the window, not by the context


def test_groups_of_similar_length_bound_padding_and_memory() -> None:
    rng = random.Random(1)
    for _ in range(300):
        tokens = rng.choice((1, 16, 64))
        lengths = [rng.choice((rng.randint(1, 300), rng.randint(1, 100_000))) for _ in range(rng.randint(1, 40))]
        groups = length_groups(lengths, tokens)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        for group in groups:
            blocks = [-(-lengths[row] // tokens) for row in group]
            widest = max(blocks)
            assert len(group) == 1 or len(group) * widest * tokens <= GROUP_ROWS
            for mine in blocks:
                assert widest - mine <= widest / 4 or (widest - mine) * tokens <= 128
    assert length_groups([1000] * 8, 16) == [list(range(8))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_merge_to_the_whole(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 16, generator=generator).to(dtype) for length in (5, 40, 40))
    v = v[..., :12]
    whole = torch.softmax(q.double() @ k.double().transpose(-1, -2) * 0.3, -1) @ v.double()
    for form in (attend_part, attend_plainly):
        merged = Merged(5)
        merged.add(form(q[:, :, 2:], k[:, :, :7], v[:, :, :7], 0.3), 2)
        merged.add(form(q[:, :, :2], k[:, :, :7], v[:, :, :7], 0.3))
        merged.add(form(q, k[:, :, 7:8], v[:, :, 7:8], 0.3))
        merged.add(form(q, k[:, :, 8:], v[:, :, 8:], 0.3))
        torch.testing.assert_close(merged.result(dtype).double(), whole, atol=TOLERANCE[dtype], rtol=0)


def test_a_row_that_sees_nothing_of_a_part_takes_nothing_from_it() -> None:
    q, k = torch.randn(2, 1, 3, 8), torch.randn(2, 1, 4, 8)
    blind = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 4)
    first, second = attend_plainly(q, k, k, 1.0, blind), attend_plainly(q, k * 2, k, 1.0)
    assert first.lse[1].eq(-torch.inf).all()
    for parts in ((first, second), (second, first)):
        merged = Merged(3)
        for part in parts:
            merged.add(part)
        torch.testing.assert_close(merged.result(torch.float32)[1], second.out[1])


def test_the_plain_form_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, mask = torch.randn(2, 2, 9, 8), torch.randn(2, 2, 6, 8), torch.rand(9, 6) > 0.4
    mask[:, 0] = True
    whole = attend_plainly(q, k, k, 0.5, mask)
    monkeypatch.setattr(partial, "SCORE_BYTES", 4 * 4 * 6 * 2)
    pieces = attend_plainly(q, k, k, 0.5, mask)
    torch.testing.assert_close((pieces.out, pieces.lse), (whole.out, whole.lse))
    torch.testing.assert_close(attend_part(q, k, k, 0.5, mask=mask).out, whole.out)


def test_kernels_by_device_and_dtype() -> None:
    assert kernel_for("cpu", torch.bfloat16, 320, masked=True) == "flash_cpu"
    assert kernel_for("cuda", torch.bfloat16, 128, masked=False) == "flash_cuda"
    assert kernel_for("cuda", torch.bfloat16, 320, masked=False) == "efficient_cuda"
    assert kernel_for("cuda", torch.float32, 128, masked=False) == "efficient_cuda"
    assert kernel_for("cuda", torch.bfloat16, 128, masked=True) == "plain"
    assert kernel_for("mps", torch.float32, 128, masked=False) == "plain"


class Scene:
    """A pool whose unwritten rows are NaN, and sequences that lie scattered in it."""

    def __init__(self, rng: random.Random, row_values: int, dtype: torch.dtype, lengths: Sequence[int]) -> None:
        tokens = rng.choice((1, 3, 8))
        blocks = sum(-(-length // tokens) for length in lengths)
        size = torch.empty((), dtype=dtype).element_size()
        layout = KvLayout(block_tokens=tokens, num_layers=2, row_bytes=row_values * size, dtype=str(dtype), name="test")
        self.cache = KvCache(layout, blocks, dtype, CPU)
        self.cache.blocks[:blocks] = torch.nan
        free = rng.sample(range(blocks), blocks)
        self.tables = [tuple(free.pop() for _ in range(-(-length // tokens))) for length in lengths]
        generator = torch.Generator().manual_seed(rng.randint(0, 1000))
        self.rows = [torch.randn(length, row_values, generator=generator).to(dtype) for length in lengths]
        for table, rows in zip(self.tables, self.rows, strict=True):
            self.cache.store(1, torch.from_numpy(self.cache.slots_of(table, np.arange(len(rows)))), rows)

    def batch(self, counts: Sequence[int]) -> ForwardBatch:
        """The last `counts` rows of every sequence."""
        slices = [
            Slice("r", [0] * len(rows), len(rows), len(rows) - count, count, table, GREEDY, True, 0)
            for rows, table, count in zip(self.rows, self.tables, counts, strict=True)
        ]
        return build_batch(slices, self.cache, CPU)


def a_scene(rng: random.Random, row_values: int, dtype: torch.dtype) -> tuple[Scene, list[int]]:
    decodes = [rng.choice((rng.randint(1, 12), rng.randint(1, 300))) for _ in range(rng.randint(0, 7))]
    chunks = [rng.randint(1, 60) for _ in range(rng.randint(1, 2))]
    lengths = decodes + [count + rng.choice((0, rng.randint(1, 90))) for count in chunks]
    return Scene(rng, row_values, dtype, lengths), [1] * len(decodes) + chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(12))
def test_grouped_query_attention(seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    kv_heads, per_group, dim = rng.choice((1, 2)), rng.choice((1, 3)), rng.choice((8, 16))
    scene, counts = a_scene(rng, 2 * kv_heads * dim, dtype)
    window = rng.choice((None, None, 1, 5, 40, 1000))
    q = torch.randn(sum(counts), kv_heads * per_group, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    attention = TorchAttention(TileSizes(rng.choice((1, 4, 16, 4096)), rng.choice((3, 1024))))
    found = attention.gqa(q, 1, scene.cache, scene.batch(counts), kv_heads, window).view_as(q)
    first = 0
    for rows, count in zip(scene.rows, counts, strict=True):
        for head in range(kv_heads * per_group):
            k, v = rows.double().view(-1, 2, kv_heads, dim)[:, :, head // per_group].unbind(1)
            mine = torch.zeros(len(rows), dim, dtype=torch.float64)
            mine[-count:] = q[first : first + count, head].double()
            expected = reference.attention(mine, k, v, dim**-0.5, window)[-count:]
            torch.testing.assert_close(
                found[first : first + count, head].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
            )
        first += count


@pytest.mark.parametrize("form", ["chosen", "absorbed", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_latent_attention_in_both_forms(seed: int, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    heads, nope, rope, rank, value = rng.choice((1, 3)), rng.choice((4, 8)), 4, rng.choice((8, 16)), rng.choice((8, 12, 16))
    joint = (torch.randn(heads * (nope + value), rank, generator=torch.Generator().manual_seed(seed)) * 0.3).to(dtype)
    weights = LatentHeads.split(joint, heads, nope)
    scene, counts = a_scene(rng, rank + rope, dtype)
    q = torch.randn(sum(counts), heads, nope + rope, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if form != "chosen":
        monkeypatch.setattr(mla, "absorbed_is_cheaper", lambda *_: form == "absorbed")
    sizes = TileSizes(rng.choice((1, 4, 16, 4096)))
    found = TorchAttention(sizes).mla(q, 1, scene.cache, scene.batch(counts), weights).view(-1, heads, value)
    first = 0
    for rows, count in zip(scene.rows, counts, strict=True):
        wide = rows.double()
        for head in range(heads):
            up = wide[:, :rank] @ joint.view(heads, -1, rank)[head].double().T
            mine = torch.zeros(len(rows), nope + rope, dtype=torch.float64)
            mine[-count:] = q[first : first + count, head].double()
            key = torch.cat((up[:, :nope], wide[:, rank:]), dim=1)
            expected = reference.attention(mine, key, up[:, nope:], (nope + rope) ** -0.5)[-count:]
            torch.testing.assert_close(
                found[first : first + count, head].double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
            )
        first += count


def test_the_cheaper_form_for_the_published_dimensions() -> None:
    weights = LatentHeads.split(torch.empty(32 * 192, 256, device="meta"), 32, 64)
    assert absorbed_is_cheaper(153, 262_144, 128, weights)
    assert not absorbed_is_cheaper(154, 262_144, 128, weights)
    assert not absorbed_is_cheaper(512, 512, 128, weights)


class Largest(TorchDispatchMode):
    """The most elements that any one result of an operator has in memory of its own."""

    def __init__(self, pool: Tensor) -> None:
        super().__init__()
        self._known = {pool.untyped_storage().data_ptr()}
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in self._known:
                self.numel = max(self.numel, one.untyped_storage().nbytes() // one.element_size())
        return result


def largest(kind: str, context: int, counts: Sequence[int], window: int | None = None) -> int:
    dims = {"mla": 64, "gqa": 2 * 2 * 32}[kind]
    scene = Scene(random.Random(0), dims, torch.float32, [context] * len(counts))
    batch, attention = scene.batch(counts), TorchAttention(TileSizes(512, 128))
    with Largest(scene.cache.blocks) as seen:
        if kind == "mla":
            weights = LatentHeads.split(torch.randn(4 * 64, 48), 4, 32)
            attention.mla(torch.randn(sum(counts), 4, 48), 1, scene.cache, batch, weights)
        else:
            attention.gqa(torch.randn(sum(counts), 4, 32), 1, scene.cache, batch, 2, window)
    return seen.numel


@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("counts", [(256,), (8,), (1, 1, 1)])
def test_no_allocation_grows_with_the_context(kind: str, counts: Sequence[int]) -> None:
    """Exact counts of elements, at 2,048 and at 8,192 tokens of context."""
    assert largest(kind, 2048, counts) == largest(kind, 8192, counts)


def test_a_window_bounds_what_is_gathered() -> None:
    assert largest("gqa", 2048, (64,), 100) == largest("gqa", 8192, (64,), 100) < largest("gqa", 2048, (64,))
    assert largest("gqa", 2048, (1, 1), 100) == largest("gqa", 8192, (1, 1), 100) < largest("gqa", 2048, (1, 1))
