from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from protos.contract.errors import EngineFailure
from workers.batching.runner import Sampled, Slice
from workers.batching.token_counts import TokenCounts
from workers.engine_api.types import SamplingParams
from workers.engines.torch.sampler import HEAD, Sampler, argmax, ordered_head
from workers.engines.torch.sampler_reference import draw

PARAMS = SamplingParams(max_tokens=1000, temperature=1.0, seed=7)
GREEDY = SamplingParams(max_tokens=1000)
LOGITS = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05]))


def a_piece(params: SamplingParams, index: int = 0, tokens: Sequence[int] = (1,), prompt: int = 1, **fields: Any) -> Slice:
    return Slice("r", tokens, prompt, 0, 1, (0,), params, True, index, **fields)


def sample(logits: torch.Tensor, pieces: Sequence[Slice]) -> list[int | None]:
    return [one.token_id for one in Sampler().sample(logits.clone(), pieces)]


def frequencies(params: SamplingParams, logits: np.ndarray[Any, Any] = LOGITS, count: int = 3000) -> dict[int, float]:
    rows = torch.from_numpy(logits).float().expand(count, -1)
    drawn = Counter(sample(rows, [a_piece(params, index) for index in range(count)]))
    return {token: drawn[token] / count for token in range(len(logits)) if drawn[token]}


def packed(vocab_size: int, allowed: Sequence[int]) -> memoryview:
    bits = np.zeros(32 * -(-vocab_size // 32), dtype=np.uint8)
    bits[list(allowed)] = 1
    return memoryview(np.packbits(bits, bitorder="little").view(np.int32))


def random_params(chance: random.Random, vocab_size: int) -> SamplingParams:
    biased = chance.sample(range(vocab_size), chance.choice([0, 0, 3, min(40, vocab_size)]))
    return SamplingParams(
        max_tokens=1000,
        temperature=chance.choice([0.0, 0.3, 0.7, 1.0, 2.5]),
        top_k=chance.choice([0, 0, 1, 5, 40, 700, vocab_size]) if vocab_size > 700 else chance.choice([0, 0, 1, 3]),
        top_p=chance.choice([1.0, 1.0, 0.5, 0.9, 0.999]),
        min_p=chance.choice([0.0, 0.0, 0.02, 0.3]),
        seed=chance.getrandbits(64),
        min_tokens=chance.choice([0, 0, 50]),
        stop_token_ids=frozenset(chance.sample(range(vocab_size), 3)),
        repetition_penalty=chance.choice([1.0, 1.0, 0.8, 1.3]),
        presence_penalty=chance.choice([0.0, 0.0, -1.0, 0.5]),
        frequency_penalty=chance.choice([0.0, 0.0, 0.2]),
        logit_bias=tuple(sorted((token_id, round(chance.uniform(-5, 5), 2)) for token_id in biased)),
    )


def random_rows(
    seed: int, count: int, vocab_size: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, list[Slice], list[set[int] | None]]:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = (torch.randn(count, vocab_size, generator=generator) * chance.choice([0.1, 2.0, 5.0])).to(dtype)
    pieces, masks = [], []
    for _ in range(count):
        prompt, output = chance.randint(1, 30), chance.randint(0, 100)
        tokens = [chance.randrange(min(vocab_size, 60)) for _ in range(prompt + output)]
        mask = set(chance.sample(range(vocab_size), vocab_size // 2)) if chance.random() < 0.2 else None
        allowed = None if mask is None else partial(packed, vocab_size, sorted(mask))
        pieces.append(a_piece(random_params(chance, vocab_size), output, tokens, prompt, allowed=allowed))
        masks.append(mask)
    return logits, pieces, masks


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert sample(logits, [a_piece(GREEDY), a_piece(GREEDY, 5)]) == [1, 0]
    wide = torch.zeros(3, 1024)
    wide[1, [130, 700, 131]] = 5.0
    wide[2, 1023] = 1.0
    assert argmax(wide).tolist() == [0, 130, 1023]


def test_argmax_equals_torch() -> None:
    for width in (128, 1000, 4096):
        logits = torch.randn(9, width, generator=torch.Generator().manual_seed(width)).bfloat16().float()
        assert torch.equal(argmax(logits), logits.argmax(-1))


@pytest.mark.parametrize("fields", [{}, {"top_k": 5}, {"top_p": 0.9999999}])
def test_draws_follow_the_distribution(fields: dict[str, Any]) -> None:
    found = frequencies(replace(PARAMS, **fields))
    for token, probability in enumerate(np.exp(LOGITS)):
        assert found[token] == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 3000))


@pytest.mark.parametrize(
    ("vocab_size", "fields"),
    [
        (700, {}),
        (700, {"top_p": 0.9}),
        (700, {"top_k": 50}),
        (700, {"min_p": 0.03}),
        (1500, {"top_p": 0.95, "temperature": 1.7}),
    ],
)
def test_chi_square_of_many_tokens(vocab_size: int, fields: dict[str, Any]) -> None:
    """Drawn tokens against the probabilities, in bins of about equal mass; 4 sigma above the mean of chi-square."""
    logits = np.random.default_rng(vocab_size).normal(size=vocab_size) * 1.5
    params = replace(PARAMS, **fields)
    scaled = (logits - logits.max()) / params.temperature
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order])
    kept = np.arange(vocab_size) < (params.top_k or vocab_size)
    kept &= np.cumsum(weights * kept) - weights < params.top_p * (weights * kept).sum()
    kept &= weights >= params.min_p
    probability = np.zeros(vocab_size)
    probability[order] = weights * kept / (weights * kept).sum()
    count = 8000 if vocab_size < HEAD else 2000
    drawn = np.zeros(vocab_size)
    for token, share in frequencies(params, logits, count).items():
        drawn[token] = share * count
    assert drawn[probability == 0].sum() == 0
    bins = (np.cumsum(probability) * 60).astype(int).clip(max=59)
    expected, seen = np.bincount(bins, probability) * count, np.bincount(bins, drawn)
    filled = expected > 5
    statistic = ((seen - expected)[filled] ** 2 / expected[filled]).sum()
    freedom = filled.sum() - 1
    assert freedom > 10
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_temperature_sharpens() -> None:
    expected = np.exp(LOGITS / 0.5) / np.exp(LOGITS / 0.5).sum()
    assert frequencies(replace(PARAMS, temperature=0.5))[0] == pytest.approx(expected[0], abs=0.04)
    assert frequencies(replace(PARAMS, temperature=1e-9), count=20) == {0: 1.0}
    assert frequencies(replace(PARAMS, temperature=5e-324, top_p=0.5), count=20) == {0: 1.0}


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
        ({"top_k": 4, "min_p": 0.25}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.7}, {0, 1}),  # 0.5 + 0.2 of the 0.85 that top_k leaves
    ],
)
def test_filters_keep_exactly_these_tokens(fields: dict[str, float], allowed: set[int]) -> None:
    assert set(frequencies(replace(PARAMS, **fields), count=400)) == allowed


@pytest.mark.parametrize(("fields", "last"), [({"top_p": 0.9}, 8999), ({"top_k": 1500}, 1499), ({"top_k": 40}, 39)])
def test_equal_logits_are_kept_by_the_lowest_id_even_beyond_the_head(fields: dict[str, Any], last: int) -> None:
    drawn = sample(torch.zeros(60, 10_000), [a_piece(replace(PARAMS, **fields), index) for index in range(60)])
    assert last * 0.8 < max(token for token in drawn if token is not None) <= last


@pytest.mark.parametrize(("seed", "vocab_size"), [(1, 5), (2, 100), (3, 130), (4, 3000), (5, 3001), (6, 2048)])
def test_every_row_equals_the_slow_twin(seed: int, vocab_size: int) -> None:
    logits, pieces, masks = random_rows(seed, 60, vocab_size)
    expected = [
        draw(row.numpy(), piece.sampling, piece.output_index, piece.tokens, piece.num_prompt_tokens, mask)
        for row, piece, mask in zip(logits, pieces, masks, strict=True)
    ]
    assert sample(logits, pieces) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gives_the_same_token_in_every_batch(dtype: torch.dtype) -> None:
    for seed, vocab_size in ((11, 3000), (12, 1024), (13, 70)):
        logits, pieces, _ = random_rows(seed, 40, vocab_size, dtype)
        together = sample(logits, pieces)
        alone = [sample(logits[row : row + 1], pieces[row : row + 1])[0] for row in range(len(pieces))]
        assert together == alone
        chance = random.Random(seed)
        for _ in range(5):
            rows = chance.sample(range(len(pieces)), chance.randint(2, len(pieces)))
            assert sample(logits[rows], [pieces[row] for row in rows]) == [alone[row] for row in rows]


def test_kept_counts_do_the_same_as_counting_anew() -> None:
    params = replace(GREEDY, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2)
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(5))
    counts, tokens = TokenCounts(3), [4, 9, 4]
    for index in range(80):
        counts.catch_up(tokens)
        (kept,) = sample(logits, [a_piece(params, index, tokens, 3, counts=counts)])
        assert kept == sample(logits, [a_piece(params, index, tokens, 3)])[0]
        assert kept == draw(logits[0].numpy(), params, index, tokens, 3)
        tokens = [*tokens, kept if kept is not None else 0]
    assert len(set(tokens[3:])) > 10


def test_stop_tokens_are_barred_until_min_tokens() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=2, stop_token_ids=frozenset({0, 77}))
    logits = torch.from_numpy(LOGITS).float()[None]
    assert [sample(logits, [a_piece(params, index)])[0] for index in range(3)] == [1, 1, 0]
    everything = replace(params, stop_token_ids=frozenset(range(5)))
    assert sample(logits, [a_piece(everything)]) == [0]  # nothing else is left
    only_stop = a_piece(params, allowed=lambda: packed(5, [0]))
    assert sample(logits, [only_stop]) == [0]


def test_a_row_fails_alone() -> None:
    def broken() -> memoryview:
        raise EngineFailure("no such grammar")

    logits = torch.tensor([[0.0, math.nan], [0.0, 1.0], [math.inf, 0.0], [-math.inf, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    pieces = [
        a_piece(PARAMS),
        a_piece(GREEDY),
        a_piece(replace(PARAMS, top_p=0.5)),
        a_piece(GREEDY),
        a_piece(GREEDY, allowed=broken),
        a_piece(PARAMS, allowed=lambda: packed(2, [])),
        a_piece(GREEDY, allowed=lambda: packed(64, [1])),
    ]
    found = Sampler().sample(logits.clone(), pieces)
    assert [one.token_id for one in found] == [None, 1, None, None, None, None, None]
    assert found[0].error == found[2].error == found[3].error == "the logits are not finite"
    assert found[4].error == "no such grammar"
    assert found[5].error == "the grammar allows no token"
    assert "8 bytes" in (found[6].error or "")
    assert Sampler().sample(logits[:3].clone(), [a_piece(GREEDY)] * 3)[0] == Sampled(None, "the logits are not finite")


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    truth = logits.double().log_softmax(-1)
    biased = replace(PARAMS, logit_bias=((7, 50.0),), temperature=0.2, logprobs=3)
    pieces = [
        a_piece(replace(GREEDY, logprobs=20)),
        a_piece(biased),
        a_piece(GREEDY),
        a_piece(replace(PARAMS, logprobs=0)),
        a_piece(replace(PARAMS, top_k=5, logprobs=1)),
    ]
    found = Sampler().sample(logits.clone(), pieces)
    assert found[2].logprobs is None
    assert found[1].token_id == 7
    for row, size in ((0, 20), (1, 3), (3, 0), (4, 1)):
        one, logprobs = found[row], found[row].logprobs
        assert logprobs is not None
        assert one.token_id is not None
        assert logprobs.logprob == pytest.approx(float(truth[row, one.token_id]), abs=1e-5)
        assert list(logprobs.top_ids) == truth[row].argsort(descending=True, stable=True)[:size].tolist()
        assert list(logprobs.top_logprobs) == pytest.approx(truth[row, list(logprobs.top_ids)].tolist(), abs=1e-5)


def test_logprobs_of_a_row_that_is_drawn_again() -> None:
    pieces = [a_piece(replace(PARAMS, top_p=0.99, logprobs=2)), a_piece(replace(GREEDY, logprobs=1))]
    found = Sampler().sample(torch.zeros(2, 4 * HEAD), pieces)
    for one in found:
        assert one.logprobs is not None
        assert one.logprobs.logprob == pytest.approx(-math.log(4 * HEAD), abs=1e-5)
    assert found[0].logprobs is not None
    assert found[0].logprobs.top_ids == (0, 1)


def test_the_head_is_ordered_by_logit_then_id() -> None:
    logits = torch.randn(7, 5000, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    values, ids = ordered_head(logits, 256)
    slow = torch.sort(logits, dim=-1, descending=True, stable=True)
    sure = values > values[:, -1:]
    assert torch.equal(values, slow.values[:, :256])
    assert torch.equal(ids[sure], slow.indices[:, :256][sure])
