"""The bounds of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds of one step, whether full blocks are shared between sequences with equal prefixes, and how many bytes of
    evicted ones the host keeps."""

    max_batch_tokens: int
    max_running: int
    prefix_cache: bool = True
    host_cache_bytes: int = 0

    def __post_init__(self) -> None:
        if self.max_batch_tokens < 1 or self.max_running < 1:
            raise ValueError("max_batch_tokens and max_running must be positive")
