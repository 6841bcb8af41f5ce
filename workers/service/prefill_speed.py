"""How fast this worker computes prompts, as the orchestrator reckons with it."""

from __future__ import annotations

_LEAST_TOKENS = 32  # a step with fewer tells of its fixed costs
_WEIGHT = 0.2  # of the newest step


class PrefillSpeed:
    """A moving average over the steps that computed prompts."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0  # zero: nothing was measured yet

    def observe(self, tokens: int, took_s: float) -> None:
        """One step that computed `tokens` rows, some of prompts. Steps that are too small or too short say nothing."""
        if tokens < _LEAST_TOKENS or took_s <= 0:
            return
        speed = tokens / took_s
        self.tokens_per_s = speed if not self.tokens_per_s else (1 - _WEIGHT) * self.tokens_per_s + _WEIGHT * speed
