"""How weights are stored in fewer bits, and back: FP8 per tensor, NVFP4, and the project's own int8 and int4.

Every `*_decode` returns fp32, [out, in], of any run of rows. A weight is [..., out, in]; blocks and groups lie along `in`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

CHUNK_VALUES = 1 << 18  # how many values are decoded at a time; 1 MiB of fp32
FP8_MAX, FP4_MAX = 448.0, 6.0
NVFP4_BLOCK = 16
INT4_GROUPS = (32, 64)
_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TINIEST = 1e-12  # keeps a scale positive for a weight of zeros


def fp8_encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values and the one fp32 scale that they are multiplied with."""
    scale = weight.abs().amax().float().clamp_min(_TINIEST) / FP8_MAX
    return (weight.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values of a matrix and one fp32 scale per row."""
    scale = x.abs().amax(-1).float().clamp_min(_TINIEST) / FP8_MAX
    return (x.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def fp8_decode(values: Tensor, scale: Tensor) -> Tensor:
    """values x scale; the scale has one element, or one per row."""
    # A table is four times as fast as the conversion on CPUs.
    table, codes = _fp8_table(values.device), values.view(torch.uint8)
    decoded = table.index_select(0, codes.flatten().int()).view(values.shape)
    return decoded.mul_(scale.float().reshape(-1, 1))


def nvfp4_encode(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed E2M1 values, E4M3 scales per 16 values, and the fp32 factor [1] by which the scales are too large."""
    blocks = _split(weight.float(), NVFP4_BLOCK)
    global_scale = FP8_MAX * FP4_MAX / weight.abs().amax().float().clamp_min(_TINIEST)
    scales = (blocks.abs().amax(-1) / FP4_MAX * global_scale).clamp(max=FP8_MAX).to(torch.float8_e4m3fn)
    scaled = blocks / (scales.float() / global_scale).clamp_min(_TINIEST)[..., None]
    halfway = torch.tensor([(low + high) / 2 for low, high in pairwise(_FP4_MAGNITUDES)])
    codes = torch.bucketize(scaled.abs(), halfway) + 8 * (scaled < 0)
    return _pack(codes.flatten(-2)), scales, global_scale.reshape(1)


def nvfp4_decode(packed: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """values x (scale of the block / global scale); the global scale has one element, or one per row."""
    values = _split(_decode_pairs(packed, _fp4_pairs(packed.device)), NVFP4_BLOCK)
    return values.mul_((scales.float() / global_scale.float().reshape(-1, 1))[..., None]).flatten(-2)


def int8_encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values from -127 to 127 and one fp32 scale per output channel, [..., out]."""
    scale = weight.float().abs().amax(-1).clamp_min(_TINIEST) / 127
    return (weight.float() / scale[..., None]).round().to(torch.int8), scale


def int8_decode(values: Tensor, scale: Tensor) -> Tensor:
    """values x scale of their output channel."""
    return torch.mul(values, scale.float()[..., None])


def int4_encode(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Packed values from -7 to 7 (stored plus 8) and one fp32 scale per group, [..., out, in / group]."""
    groups = _split(weight.float(), group)
    scale = groups.abs().amax(-1).clamp_min(_TINIEST) / 7
    return _pack(((groups / scale[..., None]).round() + 8).flatten(-2)), scale


def int4_decode(packed: Tensor, scale: Tensor) -> Tensor:
    """values x scale of their group."""
    values = _decode_pairs(packed, _int4_pairs(packed.device))
    values = _split(values, values.shape[-1] // scale.shape[-1])
    return values.mul_(scale.float()[..., None]).flatten(-2)


def decode_rows(kind: str, parts: Sequence[Tensor]) -> Tensor:
    """The values of a run of rows; plain ones as they are."""
    return parts[0] if kind == "plain" else _DECODERS[kind](*parts)


_DECODERS: dict[str, Callable[..., Tensor]] = {
    "fp8": fp8_decode,
    "nvfp4": nvfp4_decode,
    "int8": int8_decode,
    "int4": int4_decode,
}


def _split(tensor: Tensor, size: int) -> Tensor:
    """The last dimension in groups of `size`."""
    return tensor.reshape(*tensor.shape[:-1], -1, size)


def _pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes in a byte, the earlier one in the low half."""
    pairs = _split(codes.to(torch.uint8), 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def _decode_pairs(packed: Tensor, pairs: Tensor) -> Tensor:
    """Both values of every byte, from a table of 256 pairs of fp32 that are read as one number each."""
    decoded = pairs.index_select(0, packed.flatten().int()).view(torch.float32)
    return decoded.view(*packed.shape[:-1], 2 * packed.shape[-1])


@cache
def _fp8_table(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


@cache
def _fp4_pairs(device: torch.device) -> Tensor:
    return _pairs([*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES)]).to(device)


@cache
def _int4_pairs(device: torch.device) -> Tensor:
    return _pairs([float(code - 8) for code in range(16)]).to(device)


def _pairs(values: list[float]) -> Tensor:
    table = torch.tensor(values)
    codes = torch.arange(256)
    return torch.stack((table[codes & 0xF], table[codes >> 4]), dim=-1).view(torch.int64)[:, 0].contiguous()
