"""The FlashAttention library where it is installed: its kernels for newer GPUs than those that PyTorch carries.

Version 3 (module `flash_attn_interface`, Hopper and later) is preferred to version 2 (`flash_attn`). Both answer
`(out, lse, ...)` for q, k, v of [B, M, H, D] and any H that is a multiple of the heads of k and v.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor

FlashCall = Callable[..., Any]

_HOPPER = (9, 0)


def find_flash(capability: tuple[int, int], load: Callable[[str], Any] = import_module) -> FlashCall | None:
    """The library's function for a GPU of this compute capability, or None when none is installed for it."""
    names = ("flash_attn_interface", "flash_attn") if capability >= _HOPPER else ("flash_attn",)
    for name in names:
        try:
            found: FlashCall = load(name).flash_attn_func
        except (ImportError, AttributeError):
            continue
        return found
    return None


@cache
def installed_flash(device_index: int) -> FlashCall | None:
    """The same for a GPU of this process; looked up once."""
    import torch

    return find_flash(torch.cuda.get_device_capability(device_index))


def call_flash(call: FlashCall, q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """q: [B, H, M, D], k and v: [B, J, L, D]. Returns out, [B, H, M, D], and lse, [B, H, M], fp32.

    With `causal` the last rows of q and k are aligned, which is the same as the first when L = M.
    """
    found = call(
        *(x.transpose(1, 2).contiguous() for x in (q, k, v)), softmax_scale=scale, causal=causal, return_attn_probs=True
    )
    return found[0].transpose(1, 2), found[1].float()
