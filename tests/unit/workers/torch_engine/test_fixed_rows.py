"""`deterministic: true`: the bits of a row's logits depend on its own tokens alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.schema.pools import ModelConfig
from tests.support.torch_groups import a_group
from tests.support.torch_models import a_runner, a_slice, engine_config, feed, hand_off, random_tokens, run_all
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.batching.runner import Slice
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engines.torch.build import create_engine, create_runner
from workers.engines.torch.fixed_rows import ROWS, FixedRowSteps, row_passes
from workers.engines.torch.runner import TorchRunner
from workers.engines.torch.tiny import write_tiny

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 160, "num_attention_heads": 10, "num_key_value_heads": 5},
    "mistral": {"sliding_window": 40, "intermediate_size": 328},
    "mistral-small-4": {"hidden_size": 200, "n_routed_experts": 12, "q_lora_rank": 56},
}


class SeenLogits:
    """A runner's fixed passes, whose logits are kept."""

    def __init__(self, runner: TorchRunner) -> None:
        self.inner = FixedRowSteps()
        self.seen: list[Tensor] = []
        runner._steps = self

    def logits(self, *arguments: Any) -> Tensor:
        found = self.inner.logits(*arguments)
        self.seen.append(found.clone())
        return found


@pytest.fixture(params=[(kind, dtype) for kind in MODELS for dtype in ("float32", "bfloat16")], ids=str)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, ModelConfig]:
    kind, dtype = request.param
    folder = write_tiny(kind, tmp_path / "model", 3, **MODELS[kind])
    return folder, ModelConfig(name="tiny", source=str(folder), dtype=dtype, deterministic=True)


def a_fixed_runner(model: tuple[Path, ModelConfig], **fields: Any) -> TorchRunner:
    return create_runner(model[1], engine_config(**{"num_blocks": 256, **fields}), model[0])


def alone(model: tuple[Path, ModelConfig], tokens: Sequence[int], cuts: Sequence[int] = ()) -> Tensor:
    """The logits after the last token."""
    runner = a_fixed_runner(model)
    seen = SeenLogits(runner)
    feed(runner, tokens, cuts, tuple(range(100)))
    return seen.seen[-1]


def test_passes_have_every_row_once_and_in_order() -> None:
    rng = random.Random(0)
    for _ in range(100):
        slices = [
            a_slice(range(16, 216), rng.randint(0, 40), rng.randint(1, 60), (), request_id=str(i), sample=rng.random() < 0.5)
            for i in range(rng.randint(1, 9))
        ]
        passes = row_passes(slices)
        assert [sum(piece.count for piece in one) for one in passes[:-1]] == [ROWS] * (len(passes) - 1)
        assert 0 < sum(piece.count for piece in passes[-1]) <= ROWS

        def rows(pieces: Sequence[Slice]) -> list[tuple[str, int, bool]]:
            return [
                (piece.request_id, at, piece.sample and at == piece.start + piece.count - 1)
                for piece in pieces
                for at in range(piece.start, piece.start + piece.count)
            ]

        assert rows([piece for one in passes for piece in one]) == rows(slices)


def test_chunks_change_no_bit(model: tuple[Path, ModelConfig]) -> None:
    tokens = random_tokens(1, 300)
    whole = alone(model, tokens)
    rng = random.Random(2)
    for cuts in ((299,), (1, 2, 3), (16, 32, 256), sorted(rng.sample(range(1, 300), 9))):
        assert torch.equal(alone(model, tokens, cuts), whole)


def test_batch_mates_change_no_bit(model: tuple[Path, ModelConfig]) -> None:
    """Alone, and among seven others of unlike length of which some decode and some prefill, at every place."""
    tokens = random_tokens(1, 70)
    whole = alone(model, tokens)
    rng = random.Random(3)
    for place in (0, 3, 7):
        runner = a_fixed_runner(model)
        seen = SeenLogits(runner)
        mates = [random_tokens(seed, rng.choice((1, 9, 40, 280))) for seed in range(7)]
        sequences = [*mates[:place], tokens, *mates[place:]]
        bounds = [0]
        for sequence in sequences:
            bounds.append(bounds[-1] + -(-len(sequence) // 16))
        tables = [tuple(range(first, end)) for first, end in pairwise(bounds)]
        early = [rng.choice((0, len(sequence) - 1)) for sequence in sequences]
        runner.run([a_slice(s, 0, n, t, sample=False) for s, n, t in zip(sequences, early, tables, strict=True) if n])
        runner.run([a_slice(s, n, len(s) - n, t) for s, n, t in zip(sequences, early, tables, strict=True)])
        assert torch.equal(seen.seen[-1][place : place + 1], whole)


def test_close_to_the_fast_path(model: tuple[Path, ModelConfig]) -> None:
    tokens = random_tokens(1, 90)
    fast, dtype = a_runner(model[0], model[1].dtype, num_blocks=256), model[1].dtype
    from tests.support.torch_models import LogitsProbe

    probe = LogitsProbe(fast)
    feed(fast, tokens, [50], tuple(range(100)))
    tolerance = 1e-4 if dtype == "float32" else 0.2
    torch.testing.assert_close(alone(model, tokens), probe.seen[-1], atol=tolerance, rtol=0)


def test_one_engine_two_engines_and_a_recomputation_draw_the_same_tokens(model: tuple[Path, ModelConfig]) -> None:
    """In bf16 as well, under preemption, with prefix hits and across a hand-off; seeded draws at a high temperature."""
    sampling = SamplingParams(max_tokens=24, temperature=1.5, seed=9)
    prompts = {f"r{length}": random_tokens(7, length) for length in (5, 33, 80, 81, 120)}
    requests = [EngineRequest(request_id=n, epoch=1, prompt=p, sampling=sampling) for n, p in prompts.items()]
    roomy = create_engine(model[1], engine_config(num_blocks=256, max_batch_tokens=200), model[0])
    expected = run_all(roomy, requests)
    limits = EngineLimits(max_batch_tokens=37, max_running=3, prefix_cache=False)
    tight = PagedEngine(a_fixed_runner(model, num_blocks=10), limits)
    assert run_all(tight, requests) == expected
    assert tight.stats().preemptions > 0
    source, target = (create_engine(model[1], engine_config(num_blocks=64), model[0]) for _ in range(2))
    for request in requests[1:3]:
        assert hand_off(source, target, request) == expected[request.request_id]


def test_two_ranks_draw_the_same_tokens_together_and_one_by_one(tmp_path: Path) -> None:
    folder = write_tiny("mistral-small-4", tmp_path / "model", 3)
    sampling = SamplingParams(max_tokens=8, temperature=1.5, seed=9)
    requests = [
        EngineRequest(request_id=f"r{length}", epoch=1, prompt=random_tokens(length, length), sampling=sampling)
        for length in (3, 20, 41)
    ]
    with a_group(folder, 2, "bfloat16", deterministic=True, prefix_cache=False) as (engine, _):
        together = run_all(engine, requests)
        again = [replace(request, epoch=2) for request in requests]
        assert {name: run for one in again for name, run in run_all(engine, [one]).items()} == together
