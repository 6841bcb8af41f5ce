"""The slow, obviously right twin of the sampler: one row at a time, plain Python and numpy, fp64."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from workers.batching.token_counts import prompt_and_output
from workers.engine_api.types import SamplingParams

Floats = npt.NDArray[np.float64]

GROUP = 128


def draw(
    logits: npt.ArrayLike,
    params: SamplingParams,
    output_index: int,
    tokens: Sequence[int] = (),
    num_prompt: int = 0,
    allowed: Collection[int] | None = None,
) -> int:
    """The token of one row of logits. `tokens`: prompt and output so far, which penalties look at."""
    edited = edit(logits, params, output_index, tokens, num_prompt, allowed)
    if params.temperature <= 0:
        return int(edited.argmax())
    scaled = (edited - edited.max()) / max(params.temperature, 1e-30)
    if params.top_k == 0 and params.top_p >= 1:
        return _draw_in_two_levels(scaled, params, output_index)
    kept = candidates(scaled, params)
    scores = [scaled[token] + gumbel(params.seed, output_index, token) for token in kept]
    return kept[scores.index(max(scores))]


def edit(
    logits: npt.ArrayLike,
    params: SamplingParams,
    output_index: int,
    tokens: Sequence[int] = (),
    num_prompt: int = 0,
    allowed: Collection[int] | None = None,
) -> Floats:
    """The logits after grammar, barred stop tokens, bias and penalties."""
    edited: Floats = np.array(logits, dtype=np.float64)
    if allowed is not None:
        edited[[token for token in range(len(edited)) if token not in allowed]] = -math.inf
    if output_index < params.min_tokens:
        barred = edited.copy()
        barred[[token for token in params.stop_token_ids if 0 <= token < len(edited)]] = -math.inf
        edited = barred if barred.max() > -math.inf else edited
    for token, bias in params.logit_bias:
        edited[token] += bias
    for token, count in prompt_and_output(tokens, num_prompt).items():
        repetition = params.repetition_penalty
        edited[token] = edited[token] / repetition if edited[token] > 0 else edited[token] * repetition
        edited[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return edited


def candidates(scaled: Floats, params: SamplingParams) -> list[int]:
    """What top_k, then top_p, then min_p leave, by logit, then by id. `scaled`: over temperature, the greatest is 0."""
    order = sorted(range(len(scaled)), key=lambda token: (-scaled[token], token))
    order = [token for token in order if scaled[token] > -math.inf]
    order = order[: params.top_k or None]
    total = math.fsum(math.exp(scaled[token]) for token in order)
    kept: list[int] = []
    before = 0.0
    for token in order:
        if kept and before >= params.top_p * total:
            break
        kept.append(token)
        before += math.exp(scaled[token])
    return [token for token in kept if math.exp(scaled[token]) >= params.min_p]


def _draw_in_two_levels(scaled: Floats, params: SamplingParams, output_index: int) -> int:
    weights = np.exp(scaled)
    weights[weights < params.min_p] = 0
    best, chosen = -math.inf, 0
    for group, start in enumerate(range(0, len(weights), GROUP)):
        mass = weights[start : start + GROUP].sum()
        score = math.log(mass) + gumbel(params.seed, output_index, group, kind=1) if mass else -math.inf
        if score > best:
            best, chosen = score, start
    inside = [token for token in range(chosen, min(chosen + GROUP, len(weights))) if weights[token]]
    scores = [math.log(weights[token]) + gumbel(params.seed, output_index, token) for token in inside]
    return inside[scores.index(max(scores))]


def gumbel(seed: int, output_index: int, number: int, kind: int = 0) -> float:
    """Standard Gumbel noise of a token (kind 0) or of a group of tokens (kind 1)."""
    word = philox((number // 4, kind, output_index, 0), (seed % 2**32, seed >> 32))[number % 4]
    return -math.log(-math.log((word + 0.5) / 2**32))


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, as it is written in the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3
