from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from workers.engine_api.types import SamplingParams
from workers.engines.torch.sampler import draw, gumbel_noise, sample_rows

PARAMS = SamplingParams(max_tokens=1000, temperature=1.0, seed=7)
LOGITS = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05]))


def frequencies(params: SamplingParams, count: int = 3000) -> dict[int, float]:
    drawn = Counter(draw(LOGITS, params, index) for index in range(count))
    return {token: drawn[token] / count for token in sorted(drawn)}


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    greedy = SamplingParams(max_tokens=1)
    assert sample_rows(logits, [(greedy, 0), (greedy, 5)]) == [1, 0]


def test_draws_follow_the_distribution() -> None:
    found = frequencies(PARAMS)
    for token, probability in enumerate(np.exp(LOGITS)):
        assert found[token] == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 3000))


def test_temperature_sharpens() -> None:
    expected = np.exp(LOGITS / 0.5) / np.exp(LOGITS / 0.5).sum()
    assert frequencies(replace(PARAMS, temperature=0.5))[0] == pytest.approx(expected[0], abs=0.04)
    assert frequencies(replace(PARAMS, temperature=1e-9), 20) == {0: 1.0}


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.71}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.25}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.7}, {0, 1}),  # 0.5 + 0.2 of the 0.85 that top_k leaves
    ],
)
def test_filters_keep_exactly_these_tokens(fields: dict[str, float], allowed: set[int]) -> None:
    assert set(frequencies(replace(PARAMS, **fields), 400)) == allowed


def test_top_p_over_a_flat_vocabulary_looks_past_its_first_candidates() -> None:
    logits = np.zeros(10_000)
    drawn = {draw(logits, replace(PARAMS, top_p=0.9), index) for index in range(300)}
    assert max(drawn) < 9000  # equal probabilities: the lowest ids are kept
    assert max(drawn) > 6000


def test_the_noise_is_named_by_seed_and_index() -> None:
    noise = gumbel_noise(7, 3, 1000)
    assert np.array_equal(noise, gumbel_noise(7, 3, 1000))
    assert np.array_equal(noise[:10], gumbel_noise(7, 3, 10))
    for other in (gumbel_noise(8, 3, 1000), gumbel_noise(7, 4, 1000)):
        assert not np.isin(other, noise).any()
    assert np.isfinite(noise).all()
    assert gumbel_noise(2**64 - 1, 2**31, 4).shape == (4,)


def test_the_noise_never_changes() -> None:
    """A running request may move to a worker of a later release: these numbers are part of the contract."""
    assert gumbel_noise(42, 1, 3).tolist() == pytest.approx(PINNED_NOISE, rel=1e-12)


PINNED_NOISE = [-0.7042400424628209, 1.9347172387493756, 0.0616683265795393]


def test_rows_do_not_influence_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 500, generator=generator)
    rules = [(replace(PARAMS, seed=seed, top_p=0.9, temperature=0.8 * (seed % 2)), seed) for seed in range(6)]
    together = sample_rows(logits, rules)
    alone = [sample_rows(logits[row : row + 1], rules[row : row + 1])[0] for row in range(6)]
    assert together == alone
    assert sample_rows(logits.flip(0), rules[::-1]) == together[::-1]


def test_stop_tokens_are_barred_until_min_tokens() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=frozenset({0, 77}))
    assert [draw(LOGITS, params, index) for index in range(3)] == [1, 1, 0]
    logits = torch.from_numpy(LOGITS).float()[None]
    assert [sample_rows(logits, [(params, index)])[0] for index in range(3)] == [1, 1, 0]
    assert draw(LOGITS, replace(params, stop_token_ids=frozenset(range(5))), 0) == 0  # nothing else is left


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = torch.tensor([[0.0, math.nan], [0.0, 1.0], [math.inf, 0.0]])
    assert sample_rows(logits, [(PARAMS, 0), (SamplingParams(max_tokens=1), 0), (PARAMS, 0)]) == [None, 1, None]
