"""Which keys a chunk of a prompt may see."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.engines.torch.forward_batch import PrefillPart


def causal_mask(part: PrefillPart, device: torch.device) -> Tensor | None:
    """[count, start + count], true where key position <= query position; None at the start of a sequence (plain causal)."""
    if part.start == 0:
        return None
    keys = torch.arange(part.start + part.count, device=device)
    return keys[None, :] <= keys[part.start :, None]
