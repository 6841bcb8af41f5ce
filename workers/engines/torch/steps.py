"""The ways to run the slices of one step through a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from workers.batching.runner import Slice
from workers.engines.torch.forward_batch import build_batch
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.models.decoder import Decoder


class Steps(Protocol):
    """Computes steps over one pool; belongs to one thread."""

    @property
    def is_one_pass(self) -> bool:
        """True when a layer is stored once in a step, for all its rows."""
        ...

    def logits(self, decoder: Decoder, slices: Sequence[Slice], cache: KvCache, device: torch.device) -> Tensor:
        """Writes the KV rows of the slices; fp32 logits of those that sample, in order, [S, vocabulary].

        The result may be overwritten by the next call.
        """
        ...


class EagerSteps:
    """All slices in one pass."""

    is_one_pass = True

    def logits(self, decoder: Decoder, slices: Sequence[Slice], cache: KvCache, device: torch.device) -> Tensor:
        """See Steps."""
        return decoder.forward(build_batch(slices, cache, device), cache)
