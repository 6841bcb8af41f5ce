"""Sets of tokens, one bit each: token `t` is bit `t % 8` of byte `t // 8`, which is bit `t % 32` of little-endian words."""

from __future__ import annotations

from collections.abc import Iterable


def sized(bits: bytes, vocab_size: int) -> bytearray:
    """The same set as `ceil(vocab_size / 32)` words; tokens beyond the vocabulary are left out."""
    size = -(-vocab_size // 32) * 4
    words = bytearray(bits[:size].ljust(size, b"\0"))
    extra = size * 8 - vocab_size
    words[-4:] = (int.from_bytes(words[-4:], "little") & ((1 << (32 - extra)) - 1)).to_bytes(4, "little")
    return words


def contains(bits: bytes | bytearray, token_id: int) -> bool:
    return bool(bits[token_id >> 3] >> (token_id & 7) & 1)


def add(bits: bytearray, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        bits[token_id >> 3] |= 1 << (token_id & 7)


def without(bits: bytearray, token_ids: Iterable[int]) -> bytearray:
    """A copy that has none of these tokens."""
    rest = bytearray(bits)
    for token_id in token_ids:
        rest[token_id >> 3] &= ~(1 << (token_id & 7)) & 0xFF
    return rest
