"""The logprobs of one token as bytes: its own, then the ids of the alternatives, then their logprobs. Little endian.

    float32 logprob | uint32 id * n | float32 logprob * n

4 + 8 n bytes, n at most MAX_ALTERNATIVES. No bytes: the token came without.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

MAX_ALTERNATIVES = 20
MAX_PACKED_BYTES = 4 + 8 * MAX_ALTERNATIVES


def pack_logprobs(logprob: float, top_ids: Sequence[int], top_logprobs: Sequence[float]) -> bytes:
    """The bytes of one token. Raises struct.error for an id that is no uint32."""
    count = len(top_ids)
    return struct.pack(f"<f{count}I{count}f", logprob, *top_ids, *top_logprobs)


def unpack_logprobs(packed: bytes) -> tuple[float, tuple[int, ...], tuple[float, ...]]:
    """What was packed. Raises ValueError for bytes that are none, or too many."""
    if not is_packed(packed):
        raise ValueError(f"{len(packed)} bytes are no logprobs of a token")
    count = len(packed) // 8
    values = struct.unpack(f"<f{count}I{count}f", packed)
    return values[0], values[1 : 1 + count], values[1 + count :]


def is_packed(packed: bytes) -> bool:
    """True for the length of a token's logprobs."""
    return len(packed) % 8 == 4 and len(packed) <= MAX_PACKED_BYTES
