"""Attention over a part of the keys, and the sum of such parts.

q: [B, H, M, D], k: [B, J, L, D], v: [B, J, L, V] with J = H or J = 1. A part is the softmax over its own keys and the
logarithm of that softmax's denominator; parts over disjoint keys merge exactly by those logarithms (Milakov and
Gimelshein, "Online normalizer calculation for softmax", 2018). Statistics are fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engines.torch.layers.flash_library import call_flash, installed_flash

Kernel = Literal["flash_cpu", "flash_library", "flash_cuda", "efficient_cuda", "plain"]

SCORE_BYTES = 64 * 2**20  # of one score matrix of the plain form: larger ones are cut by query rows
_FLASH_CUDA_WIDEST = 256  # head dimension, a limit of that kernel


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over some keys: out, [B, H, M, V], and the log of the softmax denominator, [B, H, M], fp32."""

    out: Tensor
    lse: Tensor


def kernel_for(device: str, dtype: torch.dtype, head_dim: int, *, masked: bool, library: bool = False) -> Kernel:
    """The fused kernel that returns the denominators for this case, or the plain form.

    `library`: FlashAttention is installed for this GPU; it is preferred to the kernels that PyTorch carries.
    """
    if device == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return "flash_cpu"
    if device != "cuda" or masked or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "plain"
    if dtype is not torch.float32 and head_dim <= _FLASH_CUDA_WIDEST and head_dim % 8 == 0:
        return "flash_library" if library else "flash_cuda"
    return "efficient_cuda"


def attend_part(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None) -> Partial:
    """One fused kernel over these keys. Every row must see at least one key.

    causal: row i sees keys up to i, with L = M. mask: [M, L], true where a key is seen.
    """
    value_dim, width = v.shape[-1], max(q.shape[-1], v.shape[-1])
    flash = installed_flash(q.device.index or 0) if q.device.type == "cuda" else None
    kernel = kernel_for(q.device.type, q.dtype, width, masked=mask is not None, library=flash is not None)
    if kernel == "plain":
        if causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril_()
        return attend_plainly(q, k, v, scale, mask)
    # The kernels take one head dimension; zeros add nothing to a score, and the added values are cut off again.
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    if kernel == "flash_cpu":
        bias = None if mask is None else torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    elif kernel == "flash_library" and flash is not None:
        found = call_flash(flash, q, k, v, scale, causal=causal)
    else:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        if kernel == "flash_cuda":
            found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
        else:
            found = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return Partial(found[0][..., :value_dim], found[1][..., : q.shape[2]].float())


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Partial:
    """The same by two matrix products. A row whose mask, broadcast to [B, H, M, L], is false throughout gives 0 and -inf."""
    rows = max(1, SCORE_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[2]))
    if q.shape[2] <= rows:
        return _plain(q, k, v, scale, mask)
    per_row = mask is not None and mask.shape[-2] > 1
    parts = []
    for first in range(0, q.shape[2], rows):
        seen = mask[..., first : first + rows, :] if mask is not None and per_row else mask
        parts.append(_plain(q[:, :, first : first + rows], k, v, scale, seen))
    return Partial(torch.cat([part.out for part in parts], dim=2), torch.cat([part.lse for part in parts], dim=2))


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Partial:
    scores = torch.matmul(q, k.transpose(-1, -2)).float().mul_(scale)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    # The clamps keep a row without keys free of -inf - -inf and 0 / 0.
    highest = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights.to(v.dtype), v) / total.clamp_min(torch.finfo(torch.float32).tiny).to(v.dtype)
    return Partial(out, (highest + total.log())[..., 0])


class Merged:
    """The sum of the parts added so far, for M rows. A single part that covers all rows is kept as it is."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._only: Partial | None = None
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, part: Partial, first: int = 0) -> None:
        """Adds a part over further keys for the rows from `first` on."""
        count = part.lse.shape[-1]
        if self._out is None and self._only is None and count == self._num_rows:
            self._only = part
            return
        out, lse = self._sums(part)
        out, lse = out[:, :, first : first + count], lse[:, :, first : first + count]
        joint = torch.logaddexp(lse, part.lse)
        # Rows that saw nothing yet have -inf on both sides.
        base = joint.clamp_min(torch.finfo(torch.float32).min)
        out.mul_((lse - base).exp_()[..., None]).add_(part.out.float() * (part.lse - base).exp_()[..., None])
        lse.copy_(joint)

    def result(self, dtype: torch.dtype) -> Tensor:
        """The attention output over all keys, [B, H, M, V]."""
        if self._only is not None:
            return self._only.out.to(dtype)
        assert self._out is not None, "no part was added"
        return self._out.to(dtype)

    def _sums(self, like: Partial) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            if self._only is not None:
                self._out, self._lse = self._only.out.float().clone(), self._only.lse.clone()
            else:
                batch, heads, _, width = like.out.shape
                self._out = like.out.new_zeros((batch, heads, self._num_rows, width), dtype=torch.float32)
                self._lse = like.lse.new_full((batch, heads, self._num_rows), -torch.inf)
            self._only = None
        return self._out, self._lse
