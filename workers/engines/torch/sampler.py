"""Choosing one token from logits. The noise depends on the request's seed and the output index alone.

A draw is Gumbel-max: the token with the greatest log-probability plus its own noise. Small differences of logits
between batches or workers then almost never change the token, and no state travels with a request.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.engine_api.types import SamplingParams

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

_HEAD = 2048  # candidates that top_p looks at before it sorts the whole vocabulary


def sample_rows(logits: Tensor, params: list[tuple[SamplingParams, int]]) -> list[int | None]:
    """One token for each row of [S, V] logits, given its params and output index; None where logits are not finite.

    Greedy rows (temperature 0) take the lowest id among equal maxima. Rows never influence each other.
    """
    finite = torch.isfinite(logits).all(dim=-1).tolist()
    best = logits.argmax(dim=-1).tolist()
    tokens: list[int | None] = []
    for row, (rule, output_index) in enumerate(params):
        if not finite[row]:
            tokens.append(None)
        elif rule.temperature <= 0 and output_index >= rule.min_tokens:
            tokens.append(best[row])
        else:
            tokens.append(draw(logits[row].cpu().numpy().astype(np.float64), rule, output_index))
    return tokens


def draw(logits: Floats, params: SamplingParams, output_index: int) -> int:
    """The token of one row: stop tokens are barred before `min_tokens`, then temperature, top_k, top_p, min_p."""
    if output_index < params.min_tokens:
        barred = [token for token in params.stop_token_ids if 0 <= token < len(logits)]
        if len(barred) < len(logits):
            logits = logits.copy()
            logits[barred] = -np.inf
    if params.temperature <= 0:
        return int(logits.argmax())
    ids, kept = _candidates(logits / params.temperature, params)
    return int(ids[np.argmax(kept + gumbel_noise(params.seed, output_index, len(logits))[ids])])


def gumbel_noise(seed: int, output_index: int, size: int) -> Floats:
    """Noise of one output position: Philox keyed by the seed, with the output index in the upper counter word.

    Uses the generator's raw words only, whose stream numpy guarantees.
    """
    generator = np.random.Philox(key=seed % 2**128, counter=output_index << 192)
    uniform = (generator.random_raw(size) >> np.uint64(11)).astype(np.float64)
    noise: Floats = -np.log(-np.log((uniform + 0.5) * 2.0**-53))
    return noise


def _candidates(logits: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """Ids and logits that may be drawn, never none."""
    ids: Ids = np.flatnonzero(logits > -np.inf)
    kept = logits[ids]
    if 0 < params.top_k < len(ids):
        chosen = _largest(kept, params.top_k)
        ids, kept = ids[chosen], kept[chosen]
    if params.top_p < 1:
        chosen = _nucleus(kept, params.top_p)
        ids, kept = ids[chosen], kept[chosen]
    if params.min_p > 0:
        chosen = np.flatnonzero(kept >= kept.max() + math.log(params.min_p))
        if len(chosen):
            ids, kept = ids[chosen], kept[chosen]
    return ids, kept


def _largest(logits: Floats, count: int) -> Ids:
    """Positions of the `count` greatest, by value, then by id."""
    threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
    at_least: Ids = np.flatnonzero(logits >= threshold)
    return at_least[np.argsort(-logits[at_least], kind="stable")][:count]


def _nucleus(logits: Floats, top_p: float) -> Ids:
    """Positions of the fewest greatest whose probabilities reach `top_p`; at least one."""
    weights = np.exp(logits - logits.max())
    total = weights.sum()
    head = _largest(logits, min(_HEAD, len(logits)))
    if weights[head].sum() < top_p * total:
        head = np.argsort(-logits, kind="stable")
    before = np.cumsum(weights[head]) - weights[head]
    return head[: max(1, int(np.searchsorted(before, top_p * total, side="left")))]
