"""Lossless packing of KV: the high bytes of floating-point values compress, the others do not.

The high byte of a bf16 or fp32 value is its sign and most of its exponent, and the values of a model have few exponents. The
bytes below it are close to noise. So the high bytes go through an entropy coder, the rest travels as it is.

A packed layer group is a 32-bit little-endian number `c`, the high byte of every value, and what is below: of values of four
bytes the second byte of each, then the lower half of each; of two bytes the lower byte; of one byte nothing. `c` is 0 where the
high bytes travel as they are, because packing would not make them smaller; otherwise they are one zstd frame of `c` bytes that
states its content size. `workers/kv_transfer/packing_reference.py` says the same slowly.
"""

from __future__ import annotations

import struct
import threading

import numpy as np
import zstandard
from numpy.typing import NDArray

_HEAD = struct.Struct("<I")
HEAD_BYTES = _HEAD.size

# Exponents repeat in no pattern: the Huffman stage of zstd does the work, and its search for matches is made as cheap as it
# gets. Negative levels would turn off the Huffman stage instead.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    window_log=19, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0,
    strategy=zstandard.STRATEGY_FAST, write_content_size=True, write_checksum=False,
)  # fmt: skip
_LEAST_WINDOW_BYTES = 1024  # zstd frames state no less


class _Coders(threading.local):
    """zstd contexts serve one thread at a time: each thread has its own."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor()


_coders = _Coders()


class BytePlanes:
    """See the module. Any thread may pack and unpack at any time; numpy and zstd let go of the interpreter meanwhile."""

    def __init__(self, value_bytes: int) -> None:
        if value_bytes not in (1, 2, 4):
            raise ValueError(f"values of {value_bytes} bytes")
        self._width = value_bytes

    def most_bytes(self, raw_bytes: int) -> int:
        """No packed group is longer."""
        return HEAD_BYTES + raw_bytes

    def pack(self, raw: memoryview) -> bytes:
        """The packed form of a layer group."""
        high, below = self._split(raw)
        packed = _coders.compressor.compress(high.data)
        if len(packed) >= high.nbytes:
            return b"".join((_HEAD.pack(0), high.data, below.data))
        return b"".join((_HEAD.pack(len(packed)), packed, below.data))

    def unpack(self, packed: memoryview, raw_bytes: int) -> memoryview:
        """The layer group of `raw_bytes`, a multiple of the value's width.

        Raises ValueError for anything that `pack` does not make of so many bytes. Whatever `packed` claims, no more memory is
        taken than `raw_bytes` a few times.
        """
        count = raw_bytes // self._width
        if packed.nbytes < HEAD_BYTES:
            raise ValueError(f"{packed.nbytes} bytes are not a packed layer group")
        size = _HEAD.unpack_from(packed)[0]
        plane_bytes = size or count
        if size >= count > 0 or packed.nbytes != HEAD_BYTES + plane_bytes + raw_bytes - count:
            raise ValueError(f"{packed.nbytes} bytes with a plane of {size} are not a packed layer group of {raw_bytes}")
        plane = packed[HEAD_BYTES : HEAD_BYTES + plane_bytes]
        high = _expand(plane, count) if size else plane
        return self._join(np.frombuffer(high, np.uint8), np.frombuffer(packed[HEAD_BYTES + plane_bytes :], np.uint8))

    def _split(self, raw: memoryview) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The high bytes, and what is below. Arithmetic on whole values is faster than steps of their width."""
        values = np.frombuffer(raw, f"<u{self._width}")
        if self._width == 1:
            return values.view(np.uint8), np.empty(0, np.uint8)
        if self._width == 2:
            return (values >> 8).astype(np.uint8), values.astype(np.uint8)
        below = np.empty(3 * values.size, np.uint8)
        below[: values.size] = values >> 16 & 0xFF
        below[values.size :] = values.astype("<u2").view(np.uint8)
        return (values >> 24).astype(np.uint8), below

    def _join(self, high: NDArray[np.uint8], below: NDArray[np.uint8]) -> memoryview:
        if self._width == 1:
            return high.data
        values = high.astype(f"<u{self._width}")
        values <<= 8
        if self._width == 2:
            values |= below
        else:
            values |= below[: high.size]
            values <<= 16
            values |= np.frombuffer(below[high.size :], "<u2")
        return values.view(np.uint8).data


def _expand(frame: memoryview, size: int) -> bytes:
    """The content of one zstd frame, which must be `size` bytes and say so. Raises ValueError."""
    try:
        # The decoder takes as much memory as the frame says, so the frame is asked first.
        stated = zstandard.get_frame_parameters(frame)
        if stated.content_size != size or stated.window_size > max(size, _LEAST_WINDOW_BYTES) or stated.dict_id:
            raise ValueError(f"a zstd frame of {stated.content_size} bytes, not {size}")
        content: bytes = _coders.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a zstd frame: {error}") from error
    if len(content) != size:
        raise ValueError(f"a zstd frame of {len(content)} bytes, not {size}")
    return content
