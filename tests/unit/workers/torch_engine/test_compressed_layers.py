"""Layers over compressed weights against the same layers over the decoded ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.layers import compressed_linear
from workers.engines.torch.layers.compressed_experts import CompressedExperts
from workers.engines.torch.layers.compressed_linear import (
    CompressedLinear,
    Fp8Linear,
    Int4Linear,
    Int8Linear,
    Nvfp4Linear,
    StackedLinear,
)
from workers.engines.torch.layers.experts import PlainExperts
from workers.engines.torch.layers.linear import PlainLinear
from workers.engines.torch.number_formats import fp8_encode, int4_encode, int8_encode, nvfp4_encode


def fp8(weight: Tensor) -> Fp8Linear:
    values, scale = fp8_encode(weight)
    return Fp8Linear(values, scale.expand(len(weight)).contiguous())


def nvfp4(weight: Tensor) -> Nvfp4Linear:
    packed, scales, top = nvfp4_encode(weight)
    return Nvfp4Linear(packed, scales, top.expand(len(weight)).contiguous())


MAKE: dict[str, Callable[[Tensor], CompressedLinear]] = {
    "int8": lambda weight: Int8Linear(*int8_encode(weight)),
    "int4": lambda weight: Int4Linear(*int4_encode(weight, 32)),
    "fp8": fp8,
    "nvfp4": nvfp4,
}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("chunk_values", [1, 500, 1 << 18])
def test_product_equals_that_of_the_decoded_weight(kind: str, chunk_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_linear, "CHUNK_VALUES", chunk_values)
    layer = MAKE[kind](random(1, 50, 96) * 96**-0.5)
    assert (layer.out_features, layer.in_features) == (50, 96)
    decoded = layer.decoded(slice(0, 50))
    for rows in (0, 1, 7, 100):
        x = random(2, rows, 96)
        torch.testing.assert_close(layer(x), F.linear(x, decoded), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [24, 96])
@pytest.mark.parametrize("rows", [1, 5, 32, 33])
def test_bf16_int8_product_is_within_the_rounding_of_its_result(rows: int, width: int) -> None:
    """A width of 24 is none that torch's int8 operator takes."""
    layer = Int8Linear(*int8_encode(random(1, 50, width)))
    x = random(2, rows, width).bfloat16()
    exact = F.linear(x.double(), layer.decoded(slice(0, 50)).double())
    # Rounded once or twice on the way out; weights rounded to bf16 add as a random walk over the columns.
    allowed = exact.abs() * 2**-7 + 4 * width**0.5 * 2**-9
    assert bool(((layer(x).double() - exact).abs() <= allowed).all())


def test_scaled_product_rounds_activations_row_by_row() -> None:
    layer = fp8(random(1, 64, 96))
    x = random(2, 5, 96).bfloat16()
    x[3] *= 1000
    exact = F.linear(x.double(), layer.decoded(slice(0, 64)).double())
    error = (layer.scaled_product(x).double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert bool((error < 2**-4).all())
    assert bool((error > 0).all())


def test_stacked_formats() -> None:
    weights = [random(seed, 32, 64) for seed in range(5)]
    layers = [PlainLinear(weights[0]), *(make(weight) for make, weight in zip(MAKE.values(), weights[1:], strict=True))]
    stacked = StackedLinear(layers)
    x = random(9, 3, 64)
    assert stacked.out_features == 160
    assert torch.equal(stacked(x), torch.cat([layer(x) for layer in layers], dim=1))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("first", [0, 2])
def test_experts_equal_those_of_the_decoded_weights(kind: str, first: int) -> None:
    """Four of eight experts are held here, H = 32, F = 64."""
    gate_up = [MAKE[kind](random(seed, 128, 32)) for seed in range(4)]
    down = [MAKE[kind](random(seed, 32, 64)) for seed in range(10, 14)]
    plain = PlainExperts(*(torch.stack([one.decoded(slice(None)) for one in layers]) for layers in (gate_up, down)), first)
    held = CompressedExperts(gate_up, down, first)
    assert (held.first, held.count) == (plain.first, plain.count) == (first, 4)
    for rows in (1, 9):
        x, weights = random(3, rows, 32), random(4, rows, 3).softmax(-1)
        chosen = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(row))[:3] for row in range(rows)])
        torch.testing.assert_close(held(x, chosen, weights), plain(x, chosen, weights), atol=1e-4, rtol=1e-5)
