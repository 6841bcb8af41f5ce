"""How many different experts the tokens of a step meet."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.costs.number import Number, smaller


def covered(experts: Number, picks: Number, tokens: Number) -> Number:
    """Expected number of experts that at least one of `tokens` picks, when each picks `picks` different ones at random.

    Below one token the expectation is linear: half a token (a share of a group's) meets half its picks.
    """
    share = picks / experts
    return smaller(experts * (1.0 - (1.0 - share) ** tokens), picks * tokens)


def covered_skewed(probabilities: Sequence[float], tokens: float) -> float:
    """As `covered` when a token picks expert i with `probabilities[i]`, which sum to its picks: the slow, general way."""
    return math.fsum(1.0 - (1.0 - probability) ** tokens for probability in probabilities)
