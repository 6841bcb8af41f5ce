"""Linear layers whose weights stay in memory as they are stored: int8, int4, FP8 and NVFP4.

Where no kernel computes with the stored numbers, the product goes over chunks of rows that are decoded one after another, so
that the decoded copy never grows beyond `CHUNK_VALUES` numbers. All parts of a weight are tensors with one row per output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.layers.linear import Linear
from workers.engines.torch.number_formats import CHUNK_VALUES, fp8_decode, fp8_rows, int4_decode, int8_decode, nvfp4_decode

_SCALED_MM_COLUMNS = 16


class DecodedByRows(Protocol):
    """A weight [O, I] of which runs of rows can be decoded."""

    @property
    def out_features(self) -> int:
        """O."""
        ...

    @property
    def in_features(self) -> int:
        """I."""
        ...

    def decoded(self, rows: slice) -> Tensor:
        """These rows in fp32."""
        ...


def chunked_product(x: Tensor, weight: DecodedByRows) -> Tensor:
    """x W^T with W decoded chunk by chunk into the dtype of x."""
    out = x.new_empty(x.shape[0], weight.out_features)
    count = max(1, CHUNK_VALUES // max(weight.in_features, 1))
    for start in range(0, weight.out_features, count):
        rows = slice(start, min(start + count, weight.out_features))
        out[:, rows] = F.linear(x, weight.decoded(rows).to(x.dtype))
    return out


class Int8Linear:
    """values: [O, I] int8, scale: [O] fp32, one per output.

    torch's own int8 product for CPUs is not used: it faults on some addresses. The native step has its own.
    """

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values = values
        self.scale = scale

    @property
    def out_features(self) -> int:
        """See Linear."""
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        """I."""
        return self.values.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Everything that lies in memory."""
        return self.values, self.scale

    def decoded(self, rows: slice) -> Tensor:
        """See DecodedByRows."""
        return int8_decode(self.values[rows], self.scale[rows])

    def __call__(self, x: Tensor) -> Tensor:
        """See Linear."""
        return chunked_product(x, self)


class Int4Linear:
    """packed: [O, I / 2] uint8, the earlier column in the low half, codes 1 to 15 for -7 to 7; scales: [O, I / G] fp32."""

    def __init__(self, packed: Tensor, scales: Tensor) -> None:
        self.packed = packed
        self.scales = scales

    @property
    def out_features(self) -> int:
        """See Linear."""
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        """I."""
        return 2 * self.packed.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Everything that lies in memory."""
        return self.packed, self.scales

    def decoded(self, rows: slice) -> Tensor:
        """See DecodedByRows."""
        return int4_decode(self.packed[rows], self.scales[rows])

    def __call__(self, x: Tensor) -> Tensor:
        """See Linear."""
        return chunked_product(x, self)


class Fp8Linear:
    """values: [O, I] E4M3, scale: [O] fp32; the rows of one stored matrix have equal scales.

    On CUDA in bf16 with widths that the operator takes, activations are rounded to E4M3 too, with a scale for each row of x,
    and torch's scaled product computes with both. Elsewhere only the weight is rounded.
    """

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values = values
        self.scale = scale

    @property
    def out_features(self) -> int:
        """See Linear."""
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        """I."""
        return self.values.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Everything that lies in memory."""
        return self.values, self.scale

    def decoded(self, rows: slice) -> Tensor:
        """See DecodedByRows."""
        return fp8_decode(self.values[rows], self.scale[rows])

    def __call__(self, x: Tensor) -> Tensor:
        """See Linear."""
        fits = self.in_features % _SCALED_MM_COLUMNS == 0 and self.out_features % _SCALED_MM_COLUMNS == 0
        if fits and x.dtype is torch.bfloat16 and _has_scaled_product(x.device):
            return self.scaled_product(x)
        return chunked_product(x, self)

    def scaled_product(self, x: Tensor) -> Tensor:
        """x W^T with E4M3 on both sides. x is bf16; the device offers torch._scaled_mm with a scale per row."""
        values, scale = fp8_rows(x)
        product: Tensor = torch._scaled_mm(
            values, self.values.t(), scale_a=scale[:, None], scale_b=self.scale[None], out_dtype=torch.bfloat16
        )
        return product


def _has_scaled_product(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class Nvfp4Linear:
    """packed: [O, I / 2] uint8, scales: [O, I / 16] E4M3, global_scale: [O] fp32, which divides; see number_formats."""

    def __init__(self, packed: Tensor, scales: Tensor, global_scale: Tensor) -> None:
        self.packed = packed
        self.scales = scales
        self.global_scale = global_scale

    @property
    def out_features(self) -> int:
        """See Linear."""
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        """I."""
        return 2 * self.packed.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Everything that lies in memory."""
        return self.packed, self.scales, self.global_scale

    def decoded(self, rows: slice) -> Tensor:
        """See DecodedByRows."""
        return nvfp4_decode(self.packed[rows], self.scales[rows], self.global_scale[rows])

    def __call__(self, x: Tensor) -> Tensor:
        """See Linear."""
        return chunked_product(x, self)


class StackedLinear:
    """Weights of different formats, one below the other."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.stacked = tuple(parts)

    @property
    def out_features(self) -> int:
        """See Linear."""
        return sum(part.out_features for part in self.stacked)

    def __call__(self, x: Tensor) -> Tensor:
        """See Linear."""
        return torch.cat([part(x) for part in self.stacked], dim=-1)


CompressedLinear = Int8Linear | Int4Linear | Fp8Linear | Nvfp4Linear

COMPRESSED: dict[str, type[CompressedLinear]] = {
    "int8": Int8Linear,
    "int4": Int4Linear,
    "fp8": Fp8Linear,
    "nvfp4": Nvfp4Linear,
}
