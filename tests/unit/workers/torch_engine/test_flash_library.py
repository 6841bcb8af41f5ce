"""The FlashAttention library: which one is taken, and what is handed to it; its kernels themselves need a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.engines.torch.layers.flash_library import call_flash, find_flash
from workers.engines.torch.layers.partial import attend_plainly, kernel_for


def plain_flash(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, return_attn_probs: bool) -> Any:
    """The library's contract by plain products: [B, M, H, D] in and out, K and V with fewer heads, lse of [B, H, M]."""
    assert return_attn_probs and all(x.is_contiguous() for x in (q, k, v))
    repeat = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(repeat, 1) for x in (k, v))
    rows, keys = q.shape[2], k.shape[2]
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows) if causal else None
    found = attend_plainly(q, k, v, softmax_scale, mask)
    return found.out.transpose(1, 2), found.lse, None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_part_goes_through_the_library_as_through_plain_products(causal: bool, kv_heads: int) -> None:
    torch.manual_seed(3)
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, kv_heads, 7 if causal else 11, 16)
    v = torch.randn_like(k)
    out, lse = call_flash(plain_flash, q, k, v, 0.3, causal=causal)
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if causal else None
    wanted = attend_plainly(q, k, v, 0.3, mask)
    torch.testing.assert_close(out, wanted.out)
    torch.testing.assert_close(lse, wanted.lse)


@pytest.mark.parametrize(
    ("installed", "capability", "taken"),
    [
        (("flash_attn", "flash_attn_interface"), (9, 0), "flash_attn_interface"),
        (("flash_attn",), (9, 0), "flash_attn"),
        (("flash_attn", "flash_attn_interface"), (8, 9), "flash_attn"),
        (("flash_attn_interface",), (8, 0), None),
        ((), (10, 0), None),
    ],
)
def test_the_newest_library_that_fits_the_gpu(
    installed: tuple[str, ...], capability: tuple[int, int], taken: str | None
) -> None:
    def load(name: str) -> Any:
        if name not in installed:
            raise ImportError(name)
        return SimpleNamespace(flash_attn_func=name)

    assert find_flash(capability, load) == taken


def test_the_library_takes_the_place_of_the_kernel_that_pytorch_carries_and_of_no_other() -> None:
    for dtype, width, masked in ((torch.bfloat16, 128, False), (torch.bfloat16, 320, False), (torch.float32, 64, False)):
        without = kernel_for("cuda", dtype, width, masked=masked)
        found = kernel_for("cuda", dtype, width, masked=masked, library=True)
        assert found == ("flash_library" if without == "flash_cuda" else without)
