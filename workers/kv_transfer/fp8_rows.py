"""Lossy packing of KV: one byte for each value, and one for the scale of each row. Halves bf16 and fp16, quarters fp32.

A row is the KV of one token in one layer. Its scale is `2**k`, where `k` is the smallest integer of [-116, 120] with
`abs(value) <= 448 * 2**k` for every finite value of the row. A value travels as the e4m3 number (OCP FP8 E4M3: no infinities,
448 is the largest) that is nearest to `value / 2**k`, ties to the even one; it arrives as that number times `2**k`, in the KV's
dtype: nearest where fp16 is too coarse, and the largest finite number of the dtype (in fp32: of bf16) where it is too narrow.
What is not finite arrives as NaN; a zero keeps its sign.

As e4m3 has an exponent of its own, a finer scale would make nothing more exact, and with a power of two the product is exact.
So packing what was unpacked changes nothing more. A value of the upper 15 binary orders of its row is off by 1/16 of itself at
most, smaller ones by `2**(k - 10)`.

A packed layer group is the bytes `k + 127` of its rows, then its values, row by row.
`workers/kv_transfer/packing_reference.py` says the same slowly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]

_BIAS = 127
LEAST_SCALE, LARGEST_SCALE = -116 + _BIAS, 120 + _BIAS  # as they travel
_NAN = 0x7F
# As bits of bf16, which has 7 bits behind the point: what is not finite begins here, and below 448 lies 1.75 * 2**8.
_NOT_FINITE, _LARGEST_FINITE = 0x7F80, 0x7F7F
_POINT = 7
_DTYPES: dict[str, str] = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}
_LARGEST_FP16 = 65504.0


def _small_codes() -> Bits:
    """The e4m3 codes of bf16 numbers from 2**-10 up to 2**-6, where e4m3 has steps of 2**-9."""
    bits = np.arange(0x3A80, 0x3C80, dtype=np.uint32) << 16
    codes: Bits = np.rint(bits.view(np.float32) * 512.0).astype(np.uint16)  # rint: ties to even
    return codes


_SMALL_CODES = _small_codes()
_SMALL_BITS: Bits = (np.arange(8, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)  # bf16 of 0..7


class Fp8Rows:
    """See the module. Any thread may pack and unpack at any time; numpy lets go of the interpreter meanwhile."""

    def __init__(self, dtype: str, row_values: int) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"KV of {dtype} has no fp8 form")
        self._dtype = dtype
        self._width = row_values
        self._row_bytes = row_values * np.dtype(_DTYPES[dtype]).itemsize

    def most_bytes(self, raw_bytes: int) -> int:
        """The length of every packed group of `raw_bytes`."""
        return raw_bytes // self._row_bytes * (1 + self._width)

    def pack(self, raw: memoryview) -> bytes:
        """The packed form of a layer group, which is whole rows."""
        bits = self._bits_of(raw).reshape(-1, self._width)
        magnitude = bits & 0x7FFF
        largest = magnitude.max(axis=1)
        wild = largest >= _NOT_FINITE
        if wild.any():
            largest[wild] = np.where(magnitude[wild] < _NOT_FINITE, magnitude[wild], 0).max(axis=1)
        # 448 is 1.75 * 2**8: what is larger than 1.75 of its binary order takes the scale of the next one.
        scales = np.clip(((largest.astype(np.int32) + 0x1F) >> _POINT) - 8, LEAST_SCALE, LARGEST_SCALE)
        codes = _codes_of(magnitude.view(np.int16), scales.astype(np.int16))
        if wild.any():
            codes[magnitude >= _NOT_FINITE] = _NAN
        codes |= ((bits >> 8) & 0x80).astype(np.uint8)
        return b"".join((scales.astype(np.uint8).data, codes.data))

    def unpack(self, packed: memoryview, raw_bytes: int) -> memoryview:
        """The layer group of `raw_bytes`. Raises ValueError when the length or a scale is not one that `pack` makes."""
        rows = raw_bytes // self._row_bytes
        if raw_bytes % self._row_bytes or packed.nbytes != self.most_bytes(raw_bytes):
            raise ValueError(f"{packed.nbytes} bytes are not the fp8 form of a layer group of {raw_bytes}")
        scales = np.frombuffer(packed[:rows], np.uint8)
        if rows and (scales.min() < LEAST_SCALE or scales.max() > LARGEST_SCALE):
            raise ValueError(f"a row with the scale {scales.min()} or {scales.max()}")
        codes = np.frombuffer(packed[rows:], np.uint8).reshape(rows, self._width)
        return self._values_of(_bits_of_codes(codes, scales.astype(np.int32)))

    def _bits_of(self, raw: memoryview) -> Bits:
        """The values as bf16 bits, cut. Where bits were cut off the last one is set: it lies on the same side of every
        rounding point of e4m3 as the value did."""
        if self._dtype == "bfloat16":
            return np.frombuffer(raw, "<u2")
        floats = np.frombuffer(raw, _DTYPES[self._dtype]).astype(np.float32, copy=False)
        whole = floats.view(np.uint32)
        bits = (whole >> 16).astype(np.uint16)
        bits |= (whole & 0xFFFF) != 0
        return bits

    def _values_of(self, bits: Bits) -> memoryview:
        """Every value that e4m3 times a scale can be is a bf16 number."""
        if self._dtype == "bfloat16":
            return bits.reshape(-1).view(np.uint8).data
        floats = (bits.astype(np.uint32) << 16).view(np.float32).reshape(-1)
        if self._dtype == "float16":
            return np.clip(floats, -_LARGEST_FP16, _LARGEST_FP16).astype(np.float16).view(np.uint8).data
        return floats.view(np.uint8).data


def _codes_of(magnitude: NDArray[np.int16], scales: NDArray[np.int16]) -> NDArray[np.uint8]:
    """The e4m3 codes of finite bf16 numbers without their sign, under the scales of their rows.

    In both formats the exponent comes before the mantissa: a code is the bits, less scale and bias, with four bits rounded off.
    """
    codes = magnitude - (((scales - LEAST_SCALE + 1) << _POINT) + (3 << _POINT))[:, None]
    small = np.flatnonzero(codes < 1 << _POINT)
    at_small = codes.reshape(-1)[small] + (3 << _POINT)
    odd = (codes >> 4) & 1
    codes += odd
    codes += 7
    codes >>= 4
    codes.reshape(-1)[small] = _SMALL_CODES[np.maximum(at_small, 0)]
    return codes.astype(np.uint8)


def _bits_of_codes(codes: NDArray[np.uint8], scales: NDArray[np.int32]) -> Bits:
    """The bf16 bits of e4m3 codes times the scales of their rows."""
    magnitude = (codes & 0x7F).astype(np.uint16)
    magnitude <<= 4
    magnitude += ((scales - 7) << _POINT).astype(np.uint16)[:, None]
    if (scales == LARGEST_SCALE).any():
        np.minimum(magnitude, _LARGEST_FINITE, out=magnitude)
    special = np.flatnonzero(((codes + np.uint8(1)) & 0x7F) < 9)  # NaN, and 0..7 of the steps below the normal numbers
    if special.size:
        code = codes.reshape(-1)[special] & 0x7F
        steps = _SMALL_BITS[code & 7] + ((scales[special // codes.shape[1]] - _BIAS - 9) << _POINT)
        magnitude.reshape(-1)[special] = np.where(code == _NAN, 0x7FC0, np.where(code == 0, 0, steps))
    magnitude |= (codes & 0x80).astype(np.uint16) << 8
    return magnitude
