"""The fp8 packing against its twin, number by number, at every corner of the three dtypes."""

from __future__ import annotations

import math
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kv_transfer.fp8_rows import Fp8Rows
from workers.kv_transfer.packing_reference import e4m3, pack_fp8, read_values, unpack_fp8

DTYPES = ("bfloat16", "float16", "float32")
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def same(one: float, other: float) -> bool:
    """Equal with the sign of zero, or both no number."""
    return (math.isnan(one) and math.isnan(other)) or (one == other and math.copysign(1, one) == math.copysign(1, other))


def check(raw: bytes, dtype: str, width: int) -> None:
    """Packed bytes are those of the twin, and so are the values that arrive; packing them again changes nothing."""
    codec = Fp8Rows(dtype, width)
    packed = codec.pack(memoryview(raw))
    assert packed == pack_fp8(raw, dtype, width)
    assert len(packed) == codec.most_bytes(len(raw))
    came = bytes(codec.unpack(memoryview(packed), len(raw)))
    values, twin = read_values(came, dtype), unpack_fp8(packed, len(raw), dtype, width)
    assert len(values) == len(twin) and all(map(same, values, twin))
    again = bytes(codec.unpack(memoryview(codec.pack(memoryview(came))), len(raw)))
    assert all(map(same, read_values(again, dtype), values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bits_at_all(dtype: str) -> None:
    rng = random.Random(f"bits {dtype}")
    for width in (1, 3, 40):
        check(rng.randbytes(BYTES[dtype] * width * 12), dtype, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-149, -133, -127, -110, -24, -10, 0, 9, 100, 126])
def test_rows_of_every_scale(dtype: str, exponent: int) -> None:
    rng = np.random.default_rng(exponent + 200)
    spread = rng.integers(-18, 2, size=(6, 32))
    with np.errstate(over="ignore"):
        values = np.ldexp(rng.standard_normal((6, 32)), exponent + spread).astype(np.float32)
        if dtype == "float16":
            raw = values.astype(np.float16).tobytes()
        else:
            raw = values.tobytes() if dtype == "float32" else (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    check(raw, dtype, 32)


@given(st.lists(st.floats(width=32), min_size=1, max_size=24), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=100, deadline=None)
def test_numbers_that_hypothesis_finds(values: list[float], dtype: str) -> None:
    raw = struct.pack(f"<{len(values)}f", *values)
    if dtype == "bfloat16":
        raw = b"".join(raw[at + 2 : at + 4] for at in range(0, len(raw), 4))
    check(raw, dtype, len(values))


def test_every_tie_and_its_neighbours() -> None:
    """Half way between two codes, and the fp32 numbers beside it, under a scale that the first value sets to 1."""
    halves = np.array([(e4m3(code) + e4m3(code + 1)) / 2 for code in range(0x7E)], np.float32)
    near = np.concatenate([halves, np.nextafter(halves, np.float32(0)), np.nextafter(halves, np.float32(1e9))])
    row = np.concatenate([np.array([448.0], np.float32), near, -near])
    check(row.tobytes(), "float32", row.size)


def test_the_codes_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    values[:, 0] = 400.0  # the scale of every row is 1
    raw = values.view(torch.uint8).numpy().tobytes()
    packed = Fp8Rows("bfloat16", 96).pack(memoryview(raw))
    assert packed == bytes([127] * 64) + values.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()


def test_ordinary_numbers_lose_a_sixteenth_at_most() -> None:
    values = np.random.default_rng(2).standard_normal((50, 64)).astype(np.float32)
    came = np.frombuffer(
        Fp8Rows("float32", 64).unpack(memoryview(Fp8Rows("float32", 64).pack(values.data.cast("B"))), values.nbytes), "<f4"
    )
    steps = np.abs(values).max(axis=1, keepdims=True) * 2.0**-17
    assert (np.abs(came.reshape(50, 64) - values) <= np.maximum(np.abs(values) / 16, steps)).all()
    assert (came.reshape(50, 64) != values).mean() > 0.9


@pytest.mark.parametrize("scale", [0, 10, 248, 255])
def test_a_scale_that_nobody_packs_is_refused(scale: int) -> None:
    with pytest.raises(ValueError, match="scale"):
        Fp8Rows("bfloat16", 4).unpack(memoryview(bytes([127, scale]) + bytes(8)), 16)


@pytest.mark.parametrize("size", [0, 1, 9, 11, 4096])
def test_another_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="not the fp8 form"):
        Fp8Rows("bfloat16", 4).unpack(memoryview(bytes(size)), 16)


def test_any_codes_of_a_peer_are_numbers_of_the_dtype() -> None:
    for dtype in DTYPES:
        for scale in (11, 12, 103, 127, 140, 246, 247):
            packed = bytes([scale]) + bytes(range(256))
            came = bytes(Fp8Rows(dtype, 256).unpack(memoryview(packed), 256 * BYTES[dtype]))
            twin = unpack_fp8(packed, len(came), dtype, 256)
            assert all(map(same, read_values(came, dtype), twin))
