"""The operations that both decoders share, added to a program with their wide twins."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engines.torch.forward_batch import ForwardBatch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.layers.compressed_linear import Int8Linear
from workers.engines.torch.layers.linear import Linear, PlainLinear
from workers.engines.torch.native.program import Code, Program

BF16, F32, ADDED = 0, 1, 2  # what a product becomes: a bf16 row, an fp32 row, or a sum with an fp32 row


_MOST_BYTE_ROWS = 128  # with more, decoding the weight once and one large product are faster
_MOST_BYTE_COLUMNS = 65_536  # a sum of more products of two bytes may leave 32 bits


def is_supported(linear: Linear) -> bool:
    """Whether the native step can multiply with this weight as it lies in memory."""
    if isinstance(linear, Int8Linear):
        return linear.values.is_contiguous() and linear.in_features <= _MOST_BYTE_COLUMNS
    return isinstance(linear, PlainLinear) and linear.weight.dtype is torch.bfloat16 and linear.weight.is_contiguous()


def add_norm(program: Program, x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
    """out = rms_norm(x) in bf16; x: fp32 [rows, H]."""
    program.add(Code.NORM, x, weight, out, weight.shape[0], eps, 0, x.shape[1])


def add_linear(program: Program, x: Tensor, linear: Linear, out: Tensor, result: int) -> None:
    """out = x W^T, in the form that `result` names. x: bf16 [rows, I]; out: [rows, O]."""
    if isinstance(linear, Int8Linear):
        weight, scale, transposed = linear.values, linear.scale.float().contiguous(), None
    else:
        assert isinstance(linear, PlainLinear)
        weight, scale, transposed = linear.weight, None, linear.weight.t()

    place = len(program)

    def wide(batch: ForwardBatch, cache: KvCache, rows: int) -> None:
        if transposed is None:
            if rows <= _MOST_BYTE_ROWS:
                program.run_one(place, batch, cache, rows)
                return
            product = linear(x[:rows])
        elif result == BF16:
            torch.mm(x[:rows], transposed, out=out[:rows])
            return
        else:
            product = torch.mm(x[:rows], transposed)
        if result == ADDED:
            out[:rows].add_(product)
        else:
            out[:rows].copy_(product)

    program.add(Code.LINEAR, x, weight, out, weight.shape[1], weight.shape[0], scale, result, wide=wide)


def add_mlp(program: Program, x: Tensor, gate_up: Linear, down: Linear, inner: tuple[Tensor, Tensor], residual: Tensor) -> None:
    """residual += down(silu(gate(x)) * up(x)); inner: scratch [rows, 2F] and [rows, F]."""
    add_linear(program, x, gate_up, inner[0], BF16)
    program.add(Code.GATE, inner[0], inner[1], inner[1].shape[1])
    add_linear(program, inner[1], down, residual, ADDED)
