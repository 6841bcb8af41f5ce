"""The bits of each format, written out by hand: a round trip alone would not notice a wrong order of halves or scales."""

from __future__ import annotations

import torch

from workers.engines.torch.number_formats import (
    fp8_decode,
    fp8_encode,
    int4_decode,
    int4_encode,
    int8_decode,
    nvfp4_decode,
    nvfp4_encode,
)


def test_fp8_is_e4m3_times_the_scale() -> None:
    stored = torch.tensor([[0x38, 0xC0, 0x7E, 0x01]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert fp8_decode(stored, torch.tensor(2.0)).tolist() == [[2.0, -4.0, 896.0, 2 * 2**-9]]
    assert fp8_encode(torch.tensor([[896.0, -4.0]]))[1].item() == 2.0


def test_nvfp4_has_the_earlier_value_in_the_low_half_and_divides_by_the_global_scale() -> None:
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    scale = torch.tensor([[8.0]]).to(torch.float8_e4m3fn)
    decoded = nvfp4_decode(packed, scale, torch.tensor([4.0]))
    assert decoded.tolist() == [[2 * value for value in magnitudes] + [-2 * value for value in magnitudes]]
    again = nvfp4_encode(decoded)
    assert nvfp4_decode(*again).tolist() == decoded.tolist()


def test_int8_has_a_scale_per_row_and_int4_one_per_group() -> None:
    values = torch.tensor([[1, -127], [3, 0]], dtype=torch.int8)
    assert int8_decode(values, torch.tensor([2.0, 0.5])).tolist() == [[2.0, -254.0], [1.5, 0.0]]
    packed = torch.tensor([[0xF1, 0x88]], dtype=torch.uint8)
    assert int4_decode(packed, torch.tensor([[1.0, 3.0]])).tolist() == [[-7.0, 7.0, 0.0, 0.0]]
    weight = torch.tensor([[7.0, -2.0] * 16 + [0.0] * 32])
    assert int4_decode(*int4_encode(weight, 32)).tolist() == weight.tolist()
