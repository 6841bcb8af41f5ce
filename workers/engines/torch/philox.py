"""Noise that is named, not drawn: Philox4x32-10 by (seed, output index, token), on the device, whole batches at once.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). Words are held in int64 tensors, whose
products wrap modulo 2^64 as the unsigned ones do, so both halves of a product come out exact on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN_NOISE = 0  # of one token
GROUP_NOISE = 1  # of a group of consecutive tokens

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter of four words; int64 tensors in [0, 2^32) that broadcast together."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for step in range(_ROUNDS):
        if step:
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((second >> 32) & _MASK) ^ c1 ^ k0, second & _MASK
        c2, c3 = ((first >> 32) & _MASK) ^ c3 ^ k1, first & _MASK
    return c0, c1, c2, c3


def gumbel_of(ids: Tensor, seed: tuple[Tensor, Tensor], index: Tensor, kind: int = TOKEN_NOISE) -> Tensor:
    """Standard Gumbel noise, fp64, of the ids `[R, K]`; seed words and output index are `[R, 1]`, all int64."""
    words = philox((ids >> 2, *_rest(index, kind)), seed)
    lane = ids & 3
    low = torch.where(lane == 0, words[0], words[1])
    high = torch.where(lane == 2, words[2], words[3])
    return _gumbel(torch.where(lane < 2, low, high))


def gumbel_run(first: Tensor, count: int, seed: tuple[Tensor, Tensor], index: Tensor, kind: int = TOKEN_NOISE) -> Tensor:
    """The same for `count` consecutive ids from `first` `[R, 1]` on, which is a multiple of 4: `[R, count]`."""
    blocks = (first >> 2) + torch.arange(-(-count // 4), device=first.device)
    words = torch.stack(philox((blocks, *_rest(index, kind)), seed), dim=-1)
    return _gumbel(words.flatten(1)[:, :count])


def _rest(index: Tensor, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    zero = torch.zeros_like(index)
    return zero + kind, index, zero


def _gumbel(words: Tensor) -> Tensor:
    uniform = (words.double() + 0.5) * 2.0**-32
    return uniform.log_().neg_().log_().neg_()
