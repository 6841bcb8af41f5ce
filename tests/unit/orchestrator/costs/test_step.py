"""The cost of a step: monotone, consistent with slow twins, and refused when it is impossible."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.catalog.loader import hardware, hardware_named, model_named, models
from orchestrator.costs import flops
from orchestrator.costs.batch import Chunk, Decodes, StepBatch
from orchestrator.costs.constants import Constants, shipped_table
from orchestrator.costs.coverage import covered, covered_skewed
from orchestrator.costs.encode import encode_cost, image_patches
from orchestrator.costs.layout import Layout
from orchestrator.costs.shape import UNLIMITED, RankShape, shape_of, stacked
from orchestrator.costs.step import StepCost, engine_costs, step_cost
from orchestrator.costs.transfer import exposed_s, exposed_stepwise_s, transfer_s
from protos.contract.errors import ImpossiblePrediction

CONSTANTS = Constants()
ENGINE = engine_costs(CONSTANTS, "vllm")
GPU = hardware_named("h100")
MIXED = StepBatch(chunks=(Chunk(sequences=1.0, new=700.0, cached=300.0),), decodes=(Decodes(sequences=20.0, context=2000.0),))
LAYOUTS = {
    "llama-3.1-8b": Layout(),
    "gpt-oss-120b": Layout(tensor=2, expert=2, weights="mxfp4"),
    "deepseek-v3": Layout(tensor=1, data=8, expert=8, weights="fp8"),
    "mistral-small-4": Layout(tensor=2, weights="fp8"),
    "nemotron-3-super": Layout(tensor=4, expert=4, weights="fp8"),
    "qwen3.5-122b-a10b": Layout(tensor=2, weights="fp8"),
}


def shape(name: str) -> RankShape:
    return shape_of(model_named(name), LAYOUTS[name], GPU)


def cost(name: str, batch: StepBatch, constants: Constants = CONSTANTS) -> StepCost:
    return step_cost(shape(name), batch, constants, ENGINE).checked()


def seconds(name: str, batch: StepBatch) -> float:
    return float(cost(name, batch).seconds)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_is_its_operators_and_stays_below_every_peak(name: str) -> None:
    found = cost(name, MIXED)
    assert float(found.seconds) == pytest.approx(sum(float(one.seconds) for one in found.operators))
    assert 0 < float(found.flops_fraction) < 1
    assert 0 < float(found.memory_fraction) < 1
    assert {"linear", "head", "launch", "host"} <= {one.name for one in found.operators}


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(1, 8192),
    st.integers(0, 60_000),
    st.integers(1, 256),
    st.integers(1, 60_000),
    st.integers(1, 4000),
)
def test_more_work_is_never_cheaper(name: str, new: int, cached: int, sequences: int, context: int, more: int) -> None:
    def at(new: int, cached: int, sequences: int, context: int) -> float:
        return seconds(
            name,
            StepBatch(
                chunks=(Chunk(sequences=1.0, new=float(new), cached=float(cached)),),
                decodes=(Decodes(sequences=float(sequences), context=float(context)),),
            ),
        )

    base = at(new, cached, sequences, context)
    assert at(new + more, cached, sequences, context) > base
    assert at(new, cached + more, sequences, context) >= base
    assert at(new, cached, sequences + more, context) > base
    assert at(new, cached, sequences, context + more) >= base


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rate", ["memory_bytes_per_s", "link_bytes_per_s", "linear_flops", "expert_flops", "bf16_flops"])
def test_a_faster_gpu_is_never_slower(name: str, rate: str) -> None:
    slow = shape(name)
    fast = replace(slow, rates=replace(slow.rates, **{rate: 1.3 * float(getattr(slow.rates, rate))}))
    before, after = (float(step_cost(one, MIXED, CONSTANTS, ENGINE).seconds) for one in (slow, fast))
    assert after <= before
    if rate == "memory_bytes_per_s":
        assert after < before


def test_many_cases_at_once_are_each_case_alone() -> None:
    shapes = [shape(name) for name in LAYOUTS]
    together = step_cost(stacked(shapes), MIXED, CONSTANTS, ENGINE).checked().seconds
    alone = [step_cost(one, MIXED, CONSTANTS, ENGINE).checked().seconds for one in shapes]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_pairs_and_keys_are_those_counted_one_by_one() -> None:
    rng = random.Random(5)
    for _ in range(200):
        new, cached, limit = rng.randint(1, 60), rng.randint(0, 60), rng.choice([1, 7, 40, 1000])
        chunk = Chunk(sequences=1.0, new=float(new), cached=float(cached))
        read = [set(range(max(0, at + 1 - limit), at + 1)) for at in range(cached, cached + new)]
        assert chunk.pairs(float(limit)) == sum(len(keys) for keys in read)
        assert chunk.keys(float(limit)) >= len(set.union(*read))
        decodes = Decodes(sequences=1.0, context=float(cached + 1))
        assert decodes.keys(float(limit)) == min(cached + 1, limit)


def test_a_prompt_in_chunks_has_the_pairs_of_the_whole() -> None:
    whole = Chunk(sequences=1.0, new=900.0).pairs(UNLIMITED)
    parts = [Chunk(sequences=1.0, new=300.0, cached=float(at)).pairs(UNLIMITED) for at in (0, 300, 600)]
    assert sum(float(part) for part in parts) == whole


def test_coverage_is_what_drawing_experts_gives() -> None:
    rng = random.Random(7)
    for experts, picks, tokens in ((128, 4, 1), (128, 4, 30), (256, 8, 64), (16, 2, 3)):
        draws = 200
        met = sum(len({pick for _ in range(tokens) for pick in rng.sample(range(experts), picks)}) for _ in range(draws))
        assert covered(float(experts), float(picks), float(tokens)) == pytest.approx(met / draws, rel=0.03)
        uniform = covered_skewed([picks / experts] * experts, tokens)
        assert covered(float(experts), float(picks), float(tokens)) == pytest.approx(uniform)


def test_skewed_routing_meets_fewer_experts() -> None:
    weights = [1 / (at + 1) for at in range(64)]
    skewed = [min(1.0, 4 * weight / sum(weights)) for weight in weights]
    assert covered_skewed(skewed, 16.0) < float(covered(64.0, sum(skewed), 16.0))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt-oss-120b", "mistral-small-4"])
def test_the_operators_do_the_flops_of_the_model(name: str) -> None:
    model = model_named(name)
    layout = Layout(weights="mxfp4" if name == "gpt-oss-120b" else "bf16")
    alone = shape_of(model, layout, GPU)
    prompt = StepBatch(chunks=(Chunk(sequences=1.0, new=500.0, cached=200.0),))
    done = sum(float(one.flops) for one in step_cost(alone, prompt, CONSTANTS, ENGINE).operators)
    assert done == pytest.approx(flops.prefill_flops(model, 500, 200), rel=1e-9)
    token = StepBatch(decodes=(Decodes(sequences=1.0, context=3000.0),))
    done = sum(float(one.flops) for one in step_cost(alone, token, CONSTANTS, ENGINE).operators)
    assert done == pytest.approx(flops.decode_flops(model, 3000), rel=1e-9)


def test_a_planted_unit_error_is_refused() -> None:
    right = shape("llama-3.1-8b")
    milliseconds = replace(right.rates, memory_achieved=1e3 * float(right.rates.memory_achieved))
    with pytest.raises(ImpossiblePrediction, match=r"operator .*: predicted .* faster than the peaks"):
        step_cost(replace(right, rates=milliseconds), MIXED, CONSTANTS, ENGINE).checked()
    values = {**CONSTANTS.values, "gemm_compute": 1e3, "overlap_power": 40.0}
    with pytest.raises(ImpossiblePrediction):
        step_cost(right, StepBatch(chunks=(Chunk(sequences=1.0, new=8000.0),)), Constants(values), ENGINE).checked()
    infinite = replace(right.rates, memory_achieved=float("nan"))
    with pytest.raises(ImpossiblePrediction):
        step_cost(replace(right, rates=infinite), MIXED, CONSTANTS, ENGINE).checked()


def test_no_constant_within_its_bounds_reaches_a_peak() -> None:
    table = shipped_table().constants
    values = {name: constant.value for name, constant in table.items()}
    for name in ("gemm_compute", "weight_memory", "expert_compute", "expert_memory", "attention_compute", "attention_memory"):
        values[name] = table[name].high
    values["link"] = table["link"].high
    free = replace(ENGINE, step_s=0.0, sequence_s=0.0, kernel_s=0.0, route_s=0.0)
    for gpu in hardware().values():
        for name, layout in LAYOUTS.items():
            for batch in (MIXED, StepBatch(decodes=(Decodes(sequences=1.0, context=9000.0),))):
                step_cost(shape_of(model_named(name), layout, gpu), batch, Constants(values), free).checked()


def test_a_group_on_two_nodes_sums_over_their_network() -> None:
    model = model_named("deepseek-v3")
    near = shape_of(model, Layout(tensor=8, weights="fp8"), GPU)
    far = shape_of(model, Layout(tensor=16, weights="fp8"), GPU)
    batch = StepBatch(decodes=(Decodes(sequences=32.0, context=2000.0),))
    near_s, far_s = (
        next(
            float(one.seconds) for one in step_cost(one_shape, batch, CONSTANTS, ENGINE).operators if one.name == "collectives"
        )
        for one_shape in (near, far)
    )
    assert far_s > near_s + 122 * CONSTANTS["across_s"] * 0.99


def test_layer_wise_transfers_match_a_clock() -> None:
    rng = random.Random(3)
    for _ in range(100):
        layers, prefill_s = rng.randint(1, 80), rng.uniform(0.01, 2.0)
        size, speed, latency_s = rng.uniform(1e6, 5e9), rng.uniform(1e9, 9e10), rng.uniform(0, 1e-4)
        fast = float(exposed_s(size, float(layers), prefill_s, speed, latency_s))
        assert fast == pytest.approx(exposed_stepwise_s(size, layers, prefill_s, speed, latency_s), rel=1e-9)
        assert fast <= layers * float(transfer_s(size / layers, speed, latency_s)) + 1e-12


def test_the_reference_transfer_of_mistral_small_4() -> None:
    size = 8192 * 23_040
    assert float(transfer_s(size, 40e9, 0.0)) == pytest.approx(4.7e-3, rel=0.01)
    assert float(exposed_s(size, 36.0, 0.154, 40e9, 2e-5)) == pytest.approx(0.15e-3, rel=0.05)


def test_an_image_is_encoded_within_the_peaks() -> None:
    for model in models().values():
        if model.vision is None:
            continue
        patches = image_patches(model.vision, 1540, 1540)
        assert patches == 110 * 110
        one, two = (
            encode_cost(model.vision, shape("llama-3.1-8b").rates, float(patches), images, CONSTANTS, ENGINE).checked()
            for images in (1.0, 2.0)
        )
        assert float(one.seconds) < float(two.seconds) < 2 * float(one.seconds)
