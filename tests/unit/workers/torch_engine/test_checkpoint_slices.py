"""A rank's share of every format and layout: the right values, kept compressed where groups allow, and nothing else read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.native_params import Layout
from workers.engines.torch.config import read_config
from workers.engines.torch.layers.compressed_experts import CompressedExperts
from workers.engines.torch.layers.compressed_linear import COMPRESSED, StackedLinear
from workers.engines.torch.layers.experts import PlainExperts
from workers.engines.torch.layers.linear import PlainLinear
from workers.engines.torch.registry import shapes_of
from workers.engines.torch.stored_tensors import Entry, Shards
from workers.engines.torch.tiny import write_tiny
from workers.engines.torch.tiny_files import ENCODINGS, LAYOUTS, Encoding
from workers.engines.torch.weights import WHOLE, Checkpoint, open_checkpoint

ATTENTION, EXPERTS = "model.layers.1.self_attn.", "model.layers.1.mlp.experts."
SHARED = "model.layers.1.mlp.shared_experts."


@contextmanager
def opened(folder: Path, *, compressed: bool) -> Iterator[Checkpoint]:
    shapes = shapes_of(read_config(folder))
    with open_checkpoint(folder, shapes, torch.float32, torch.device("cpu"), compressed=compressed) as checkpoint:
        yield checkpoint


def value_of(layer: Any) -> Tensor:
    """The weight that a layer multiplies with, in fp32."""
    if isinstance(layer, PlainLinear):
        return layer.weight
    if isinstance(layer, StackedLinear):
        return torch.cat([value_of(part) for part in layer.stacked])
    decoded: Tensor = layer.decoded(slice(None))
    return decoded


@pytest.fixture(scope="module", params=[(layout, encoding) for layout in LAYOUTS for encoding in ENCODINGS], ids="-".join)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout, encoding = request.param
    return made(tmp_path_factory.mktemp("slices"), layout, encoding)


def made(parent: Path, layout: Layout, encoding: Encoding) -> Path:
    dims = {"q_lora_rank": 64, "num_hidden_layers": 2}
    path = parent / f"{layout}-{encoding}"
    return write_tiny("mistral-small-4", path, 7, layout=layout, encoding=encoding, shards=3, **dims)


def test_every_share_is_the_slice_of_the_whole(folder: Path) -> None:
    encoding = folder.name.split("-")[1]
    with opened(folder, compressed=True) as kept, opened(folder, compressed=False) as decoded:
        for name in (ATTENTION + "o_proj.weight", SHARED + "down_proj.weight", SHARED + "gate_proj.weight"):
            whole = decoded.take(name)
            height, width = whole.shape
            for columns in (WHOLE, slice(0, width // 2), slice(width // 2, width), slice(5, 27)):
                for rows in (WHOLE, slice(height // 2, height), slice(3, 4)):
                    layer = kept.linear(name, rows=rows, columns=columns)
                    assert torch.equal(value_of(layer), whole[rows, columns])
                    assert torch.equal(value_of(decoded.linear(name, rows=rows, columns=columns)), whole[rows, columns])
                    can_keep = encoding in COMPRESSED and (encoding != "nvfp4" or "experts" in name)
                    is_kept = can_keep and (columns != slice(5, 27) or encoding in ("fp8", "int8"))
                    if columns in (WHOLE, slice(5, 27)):
                        assert type(layer) is (COMPRESSED[encoding] if is_kept else PlainLinear)
                    assert layer.out_features == len(range(height)[rows])
        for name in (ATTENTION + "kv_b_proj.weight", EXPERTS + "down_proj", "model.norm.weight"):
            assert torch.equal(kept.take(name, slice(1, 3)), decoded.take(name)[1:3])


def test_fused_rows_keep_the_scale_of_their_own_weight(folder: Path) -> None:
    encoding = folder.name.split("-")[1]
    inner = slice(16, 48)
    names = [SHARED + "gate_proj.weight", SHARED + "up_proj.weight"]
    with opened(folder, compressed=True) as kept, opened(folder, compressed=False) as decoded:
        layer = kept.fused([(name, inner) for name in names])
        assert torch.equal(value_of(layer), torch.cat([decoded.take(name)[inner] for name in names]))
        assert isinstance(layer, COMPRESSED.get(encoding, PlainLinear))


def test_held_experts(folder: Path) -> None:
    encoding = folder.name.split("-")[1]
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([[0, 2, 3], [5, 4, 1], [2, 3, 7], [6, 0, 1], [2, 5, 0], [3, 2, 1]])
    weights = torch.full((6, 3), 1 / 3)
    with opened(folder, compressed=True) as kept, opened(folder, compressed=False) as decoded:
        whole = [decoded.take(EXPERTS + name) for name in ("gate_up_proj", "down_proj")]
        for held in (slice(0, 8), slice(2, 4), slice(7, 8)):
            experts = kept.experts(EXPERTS, held)
            assert isinstance(experts, CompressedExperts if encoding in COMPRESSED else PlainExperts)
            plain = decoded.experts(EXPERTS, held)
            assert isinstance(plain, PlainExperts)
            assert [torch.equal(a, b[held]) for a, b in zip((plain.gate_up, plain.down), whole, strict=True)] == [True, True]
            assert (experts.first, experts.count) == (held.start, held.stop - held.start)
            torch.testing.assert_close(experts(x, chosen, weights), plain(x, chosen, weights), atol=1e-5, rtol=0)


def test_a_rank_reads_its_share_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the numbers in every view of a file; a quarter of the experts and half of the columns are taken."""
    read: list[int] = []
    inner = Shards.view

    def counted(self: Shards, entry: Entry, *where: int | slice) -> Tensor:
        view = inner(self, entry, *where)
        read.append(view.nbytes)
        return view

    monkeypatch.setattr(Shards, "view", counted)
    with opened(folder, compressed=True) as checkpoint:
        for take in (
            lambda part: checkpoint.experts(EXPERTS, slice(2, 4) if part else slice(0, 8)),
            lambda part: checkpoint.linear(ATTENTION + "o_proj.weight", columns=slice(0, 64) if part else WHOLE),
            lambda part: checkpoint.linear(ATTENTION + "o_proj.weight", rows=slice(0, 32) if part else WHOLE),
        ):
            read.clear()
            take(False)
            whole = sum(read)
            read.clear()
            take(True)
            # Scales of whole matrices, at most one per expert, are read besides.
            assert sum(read) <= math.ceil(whole / 2 if len(read) < 20 else whole / 4) + 16 * 1024
            assert sum(read) < 0.8 * whole


def test_parts_of_different_formats_and_shards_fuse(tmp_path: Path) -> None:
    folder = write_tiny("mistral", tmp_path / "m", 7, encoding="int8", shards=1)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.k_proj.weight"
    plain = torch.randn(tensors[name].shape).bfloat16()
    scale = tensors.pop(name + "_scale")
    save_file({**tensors, name: plain}, path)
    prefix = "model.layers.0.self_attn."
    with opened(folder, compressed=True) as kept:
        layer = kept.fused([(f"{prefix}{part}_proj.weight", slice(0, 16)) for part in "qkv"])
        assert isinstance(layer, StackedLinear)
        assert torch.equal(value_of(layer)[16:32], plain[:16].float())
        assert torch.equal(value_of(layer)[:16], kept.take(prefix + "q_proj.weight")[:16])
    assert scale.shape == (len(plain),)


def test_a_tied_embedding_lies_in_memory_once(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "m", 7, tie_word_embeddings=True)
    with opened(folder, compressed=True) as checkpoint:
        embedding = checkpoint.take("model.embed_tokens.weight")
        head = checkpoint.linear("model.embed_tokens.weight", rows=slice(8, 24))
    assert isinstance(head, PlainLinear)
    assert head.weight.data_ptr() == embedding[8:].data_ptr()
    assert torch.equal(head.weight, embedding[8:24])
