"""The lossless packing: every byte comes back, and nothing that a peer sends costs more than an error."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kv_transfer.byte_planes import HEAD_BYTES, BytePlanes
from workers.kv_transfer.packing_reference import unpack_planes

WIDTHS = (1, 2, 4)
ROUNDS = 200


def bf16_like(seed: int, count: int) -> bytes:
    """Numbers of one scale, as activations are: their high bytes compress."""
    values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def both(packed: bytes, raw_bytes: int, width: int) -> tuple[bytes, bytes]:
    fast = bytes(BytePlanes(width).unpack(memoryview(packed), raw_bytes))
    return fast, unpack_planes(packed, raw_bytes, width)


@given(st.sampled_from(WIDTHS), st.integers(0, 300), st.binary(max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_every_byte_comes_back(width: int, count: int, alphabet: bytes, rng: random.Random) -> None:
    raw = bytes(rng.choice(alphabet) if alphabet else rng.randrange(256) for _ in range(count * width))
    codec = BytePlanes(width)
    packed = codec.pack(memoryview(raw))
    assert len(packed) <= codec.most_bytes(len(raw))
    assert both(packed, len(raw), width) == (raw, raw)


@pytest.mark.parametrize("special", [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x0001, 0x7F7F])
def test_zeros_infinities_and_nan_are_bytes_like_any_other(special: int) -> None:
    raw = struct.pack("<H", special) * 4096
    packed = BytePlanes(2).pack(memoryview(raw))
    assert len(packed) < len(raw) * 0.6
    assert both(packed, len(raw), 2) == (raw, raw)


def test_numbers_of_one_scale_become_smaller_and_noise_does_not_grow() -> None:
    raw, noise = bf16_like(1, 100_000), random.Random(1).randbytes(200_000)
    codec = BytePlanes(2)
    assert len(codec.pack(memoryview(raw))) < 0.75 * len(raw)
    assert len(codec.pack(memoryview(noise))) == len(noise) + HEAD_BYTES == codec.most_bytes(len(noise))


def test_damage_is_an_error_or_other_bytes_never_a_crash() -> None:
    rng = random.Random(5)
    raw = bf16_like(3, 2000)
    codec = BytePlanes(2)
    good = codec.pack(memoryview(raw))
    refused = 0
    for _ in range(ROUNDS):
        bad = bytearray(good)
        match rng.randrange(4):
            case 0:
                del bad[rng.randrange(len(bad)) :]
            case 1:
                bad += rng.randbytes(rng.randrange(1, 100))
            case 2:
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            case _:
                at = rng.randrange(len(bad))
                bad[at : at + 8] = rng.randbytes(len(bad[at : at + 8]))
        try:
            came = bytes(codec.unpack(memoryview(bytes(bad)), len(raw)))
        except ValueError:
            refused += 1
        else:
            assert len(came) == len(raw), "other bytes: the digest is what finds them"
    assert refused >= ROUNDS // 3


def frame(content: bytes, **parameters: object) -> bytes:
    return zstandard.ZstdCompressor(**parameters).compress(content)


def test_a_frame_that_claims_too_much_is_refused_before_memory_is_taken() -> None:
    raw_bytes = 1 << 16
    count = raw_bytes // 2
    rest = bytes(count)
    bomb = frame(bytes(64 << 20))
    silent = frame(bytes(count), compression_params=zstandard.ZstdCompressionParameters(write_content_size=False))
    magic, empty_block = b"\x28\xb5\x2f\xfd", b"\x01\x00\x00"
    liar = magic + b"\xe0" + struct.pack("<Q", 1 << 62) + empty_block  # content size and window of 2**62
    windowed = magic + b"\x80\x88" + struct.pack("<I", count) + empty_block  # the right size, a window of 2**27
    two = frame(bytes(count)) + frame(bytes(8))
    skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"abcd"
    for plane in (bomb, silent, liar, windowed, two, skippable, frame(bytes(count - 1)), b"\x00" * 20):
        packed = struct.pack("<I", len(plane)) + plane + rest
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="zstd frame"):
                BytePlanes(2).unpack(memoryview(packed), raw_bytes)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak_bytes < 4 * raw_bytes


@pytest.mark.parametrize("size", [1, 7, 2**31, 2**32 - 1])
def test_a_plane_size_that_does_not_fit_is_refused(size: int) -> None:
    raw = bf16_like(3, 500)
    packed = bytearray(BytePlanes(2).pack(memoryview(raw)))
    packed[:HEAD_BYTES] = struct.pack("<I", size)
    with pytest.raises(ValueError, match="not a packed layer group"):
        BytePlanes(2).unpack(memoryview(bytes(packed)), len(raw))


def test_threads_pack_and_unpack_side_by_side() -> None:
    from concurrent.futures import ThreadPoolExecutor

    codec = BytePlanes(2)
    groups = [bf16_like(seed, 20_000) for seed in range(24)]

    def there_and_back(raw: bytes) -> bytes:
        return bytes(codec.unpack(memoryview(codec.pack(memoryview(raw))), len(raw)))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(there_and_back, groups)) == groups
