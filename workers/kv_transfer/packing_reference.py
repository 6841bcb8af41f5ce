"""Both packed forms of KV once more, value by value: the twins that byte_planes and fp8_rows are compared with.

Nothing here is fast, and nothing is shared with what it checks but the definitions in their docstrings.
"""

from __future__ import annotations

import math
import struct

import zstandard

_FORMATS = {"float16": "<e", "float32": "<f"}
_LARGEST = {"bfloat16": float.fromhex("0x1.fep127"), "float16": 65504.0, "float32": float.fromhex("0x1.fep127")}
_HEAD_BYTES = 4


def unpack_planes(packed: bytes, raw_bytes: int, value_bytes: int) -> bytes:
    """What `BytePlanes.unpack` makes of a packed group, which must be well formed."""
    count = raw_bytes // value_bytes
    (size,) = struct.unpack("<I", packed[:_HEAD_BYTES])
    end = _HEAD_BYTES + (size or count)
    plane = packed[_HEAD_BYTES:end]
    high = zstandard.ZstdDecompressor().decompress(plane) if size else plane
    planes = [high]
    if value_bytes == 4:
        planes.append(packed[end : end + count])
        lower = packed[end + count :]
        planes += [lower[1::2], lower[::2]]
    elif value_bytes == 2:
        planes.append(packed[end:])
    return bytes(plane[at] for at in range(count) for plane in reversed(planes))


def pack_fp8(raw: bytes, dtype: str, row_values: int) -> bytes:
    """What `Fp8Rows.pack` makes of whole rows."""
    values = read_values(raw, dtype)
    scales, codes = bytearray(), bytearray()
    for start in range(0, len(values), row_values):
        row = values[start : start + row_values]
        k = _scale_of(row)
        scales.append(k + 127)
        codes += bytes(_code_of(value, k) for value in row)
    return bytes(scales + codes)


def unpack_fp8(packed: bytes, raw_bytes: int, dtype: str, row_values: int) -> list[float]:
    """The values that `Fp8Rows.unpack` gives, which are numbers of the dtype."""
    rows = len(packed) // (1 + row_values)
    assert raw_bytes == rows * row_values * (4 if dtype == "float32" else 2)
    values = []
    for at, code in enumerate(packed[rows:]):
        value = math.ldexp(e4m3(code & 0x7F), packed[at // row_values] - 127)
        if dtype == "float16" and value <= _LARGEST[dtype]:  # the only one that can be too coarse
            value = struct.unpack("<e", struct.pack("<e", value))[0]
        values.append(math.copysign(min(value, _LARGEST[dtype]), -1.0 if code & 0x80 else 1.0))
    return values


def read_values(raw: bytes, dtype: str) -> list[float]:
    """The numbers in a layer group."""
    if dtype == "bfloat16":
        halves = struct.unpack(f"<{len(raw) // 2}H", raw)
        return [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    return [value for (value,) in struct.iter_unpack(_FORMATS[dtype], raw)]


def e4m3(code: int) -> float:
    """The number of a code from 0 to 127."""
    exponent, mantissa = code >> 3, code & 7
    if code == 0x7F:
        return math.nan
    if not exponent:
        return mantissa * 2.0**-9
    return (8 + mantissa) * 2.0 ** (exponent - 10)


def _scale_of(row: list[float]) -> int:
    largest = max((abs(value) for value in row if math.isfinite(value)), default=0.0)
    k = -116
    while k < 120 and largest > math.ldexp(448.0, k):
        k += 1
    return k


def _code_of(value: float, k: int) -> int:
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    if not math.isfinite(value):
        return sign | 0x7F
    scaled = math.ldexp(abs(value), -k)  # exact: a double has room for it
    return sign | min(range(0x7F), key=lambda code: (abs(e4m3(code) - scaled), code & 1))
