"""How weights are stored in fewer bits, and back: FP8 per tensor, NVFP4, and the project's own int8 and int4.

Every `*_decode` returns fp32. Encoders exist so that tiny checkpoints hold what published ones hold. A weight is
[..., out, in]; blocks and groups lie along `in`.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX, FP4_MAX = 448.0, 6.0
NVFP4_BLOCK = 16
INT4_GROUPS = (32, 64)
_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TINIEST = 1e-12  # keeps a scale positive for a weight of zeros


def fp8_encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values and the one fp32 scale that they are multiplied with."""
    scale = weight.abs().amax().float().clamp_min(_TINIEST) / FP8_MAX
    return (weight.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def fp8_decode(values: Tensor, scale: Tensor) -> Tensor:
    """values x scale; the scale has one element."""
    return values.float() * scale.float().reshape(())


def nvfp4_encode(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed E2M1 values, E4M3 scales per 16 values, and the fp32 factor [1] by which the scales are too large."""
    blocks = _split(weight.float(), NVFP4_BLOCK)
    global_scale = FP8_MAX * FP4_MAX / weight.abs().amax().float().clamp_min(_TINIEST)
    scales = (blocks.abs().amax(-1) / FP4_MAX * global_scale).clamp(max=FP8_MAX).to(torch.float8_e4m3fn)
    scaled = blocks / (scales.float() / global_scale).clamp_min(_TINIEST)[..., None]
    magnitudes = torch.tensor(_FP4_MAGNITUDES)
    codes = (scaled.abs()[..., None] - magnitudes).abs().argmin(-1) + 8 * (scaled < 0)
    return _pack(codes.flatten(-2)), scales, global_scale.reshape(1)


def nvfp4_decode(packed: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """values x (scale of the block / global scale)."""
    table = torch.tensor([*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES)], device=packed.device)
    values = _split(table[_unpack(packed).int()], NVFP4_BLOCK)
    return (values * (scales.float() / global_scale.float().reshape(()))[..., None]).flatten(-2)


def int8_encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values from -127 to 127 and one fp32 scale per output channel, [..., out]."""
    scale = weight.float().abs().amax(-1).clamp_min(_TINIEST) / 127
    return (weight.float() / scale[..., None]).round().to(torch.int8), scale


def int8_decode(values: Tensor, scale: Tensor) -> Tensor:
    """values x scale of their output channel."""
    return values.float() * scale.float()[..., None]


def int4_encode(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Packed values from -7 to 7 (stored plus 8) and one fp32 scale per group, [..., out, in / group]."""
    groups = _split(weight.float(), group)
    scale = groups.abs().amax(-1).clamp_min(_TINIEST) / 7
    return _pack(((groups / scale[..., None]).round() + 8).flatten(-2)), scale


def int4_decode(packed: Tensor, scale: Tensor) -> Tensor:
    """values x scale of their group."""
    values = _unpack(packed).float() - 8
    values = _split(values, values.shape[-1] // scale.shape[-1])
    return (values * scale.float()[..., None]).flatten(-2)


def _split(tensor: Tensor, size: int) -> Tensor:
    """The last dimension in groups of `size`."""
    return tensor.reshape(*tensor.shape[:-1], -1, size)


def _pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes in a byte, the earlier one in the low half."""
    pairs = _split(codes.to(torch.uint8), 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
