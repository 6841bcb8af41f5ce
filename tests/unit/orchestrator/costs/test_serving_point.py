"""The closed loop: what load, memory, chunks and two pools do to the time to first token and the time per token."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from configs.catalog.loader import hardware_named, model_named
from orchestrator.costs.constants import Constants
from orchestrator.costs.layout import Layout
from orchestrator.costs.memory import places, request_bytes
from orchestrator.costs.serving_point import ClosedLoop, Pool, ServingPoint, predict
from orchestrator.costs.shape import shape_of
from orchestrator.costs.step import engine_costs

CONSTANTS = Constants()
MODEL = model_named("llama-3.1-70b")
GPU = hardware_named("h200")
LAYOUT = Layout(tensor=4, weights="fp8", kv="fp8")
POOL = Pool(shape=shape_of(MODEL, LAYOUT, GPU), instances=1.0, places=300.0)
LOOP = ClosedLoop(
    prefill=POOL,
    decode=POOL,
    split=0.0,
    prompt_tokens=2048.0,
    output_tokens=512.0,
    concurrency=32.0,
    chunk_tokens=8192.0,
    spread=1.0,
    sequence_limit=1000.0,
    engine=engine_costs(CONSTANTS, "vllm"),
    first_token_s=0.03,
    first_wave=0.1,
    handoff_s=0.1,
)


def at(**changes: object) -> ServingPoint:
    return predict(replace(LOOP, **changes), CONSTANTS)  # type: ignore[arg-type]


def test_more_clients_wait_longer_and_slow_each_other() -> None:
    points = [at(concurrency=float(clients)) for clients in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    for fewer, more in pairwise(points):
        assert more.tpot_s > fewer.tpot_s
        assert more.ttft_s > fewer.ttft_s
        assert fewer.running < more.running


def test_one_client_meets_nobody() -> None:
    alone = at(concurrency=1.0)
    assert alone.tpot_s == alone.decode_step_s
    assert alone.ttft_s == pytest.approx(0.03 + float(alone.decode_step_s) + float(alone.prefill_s))
    assert alone.saturated == 0


def test_tokens_per_second_never_exceed_what_prompts_allow() -> None:
    """By Little's law a cycle cannot prefill more prompts than fit into it."""
    for clients in (8, 64, 256):
        for output_tokens in (16.0, 128.0, 1024.0):
            point = at(concurrency=float(clients), output_tokens=output_tokens)
            cycle = float(point.ttft_s) + output_tokens * float(point.tpot_s)
            assert clients / cycle * float(point.prefill_s) < 1.1


def test_a_full_cache_makes_the_rest_wait_for_whole_cycles() -> None:
    roomy, full = at(concurrency=256.0), at(concurrency=256.0, decode=replace(POOL, places=64.0))
    assert roomy.saturated == 0
    assert full.saturated == 0.75
    assert full.tpot_s < roomy.tpot_s
    assert full.ttft_s > 3 * 512 * float(full.tpot_s)
    limited = at(concurrency=256.0, sequence_limit=64.0)
    assert limited.ttft_s == full.ttft_s


def test_prompts_of_others_leave_when_they_have_a_pool_of_their_own() -> None:
    shared = at(concurrency=128.0)
    apart = at(concurrency=128.0, split=1.0, prefill=replace(POOL, instances=2.0))
    assert apart.tpot_s < shared.tpot_s
    assert apart.tpot_s == pytest.approx(float(apart.decode_step_s))
    one = at(concurrency=128.0, split=1.0, prefill=POOL)
    assert apart.ttft_s < one.ttft_s


def test_equal_lengths_keep_prompts_together() -> None:
    assert at(spread=0.0).ttft_s > at(spread=1.0).ttft_s


def test_what_fits_beside_the_weights() -> None:
    tokens = 4096
    alone = Layout(tensor=1, weights="fp8", kv="fp8")
    shape = shape_of(MODEL, alone, GPU)
    assert request_bytes(MODEL, alone, tokens) == 163_840 * tokens
    assert request_bytes(MODEL, LAYOUT, tokens) == 163_840 * tokens / 4
    assert 50 < places(MODEL, alone, shape, GPU, tokens) < 110
    bf16 = shape_of(MODEL, Layout(), GPU)
    assert places(MODEL, Layout(), bf16, GPU, tokens) == 0, "141 GB of weights leave nothing"


def test_a_measured_engine_holds_as_many_tokens() -> None:
    """vLLM 0.19 on an RTX 4090 reports 41,408 tokens of cache for Llama 3.1 8B in bf16."""
    model, gpu = model_named("llama-3.1-8b"), hardware_named("rtx4090")
    assert places(model, Layout(), shape_of(model, Layout(), gpu), gpu, 1) == pytest.approx(41_408, rel=0.05)


def test_latent_rows_are_on_every_gpu_of_a_tensor_group() -> None:
    model = model_named("mistral-small-4")
    for tensor in (1, 2, 8):
        assert request_bytes(model, Layout(tensor=tensor, weights="fp8"), 1000) == 23_040_000
