"""The oracle model: one arithmetic, three ways to compute it; and what the clock is charged."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.model_card import card_of, oracle_card
from configs.schema.pools import EngineConfig, ModelConfig, OracleCosts
from protos.contract.errors import ModelError
from tests.contract.driver import a_prompt, a_request, run
from workers.engine_api.clock import ManualClock, SystemClock
from workers.engine_api.protocol import Engine
from workers.engine_api.types import SamplingParams
from workers.engines.oracle import create_engine, oracle_model
from workers.engines.oracle.model import ALPHABET, OracleModel
from workers.engines.oracle.reference import expected_tokens, expected_tokens_fast

MODEL = OracleModel("m", context_tokens=200)
PROMPT = (10, 20, 30)
PINNED = b"YYtEgnuTd LXhtckLHpIEkjT"

samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 20),
    temperature=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.integers(0, 10),
    stop_token_ids=st.frozensets(st.sampled_from(ALPHABET), max_size=10),
)


@settings(max_examples=60, deadline=None)
@given(
    model=st.builds(
        OracleModel,
        st.text(max_size=5),
        num_layers=st.integers(1, 5),
        row_bytes=st.sampled_from([8, 16, 32]),
        context_tokens=st.integers(60, 80),
    ),
    prompt=st.lists(st.integers(0, 258), min_size=1, max_size=59),
    sampling=samplings,
    count=st.none() | st.integers(0, 20),
)
def test_the_fast_reference_is_the_plain_one(
    model: OracleModel, prompt: list[int], sampling: SamplingParams, count: int | None
) -> None:
    assert expected_tokens_fast(model, prompt, sampling, count) == expected_tokens(model, prompt, sampling, count)


def test_the_model_is_pinned() -> None:
    """Tokens of a model do not change between releases: clients compare with recorded ones."""
    text = bytes(token - 3 for token in expected_tokens(MODEL, PROMPT, SamplingParams(max_tokens=24)))
    assert text == PINNED


def test_output_is_text_and_never_ends_by_itself() -> None:
    tokens = expected_tokens_fast(MODEL, PROMPT, SamplingParams(max_tokens=190))
    assert len(tokens) == 190
    assert set(tokens) <= set(ALPHABET)
    assert len(set(tokens)) > 40
    text = bytes(token - 3 for token in tokens).decode()
    assert text.replace(" ", "").isalpha()


@pytest.mark.parametrize(
    ("model", "prompt", "sampling"),
    [
        (OracleModel("other", context_tokens=200), PROMPT, {}),
        (MODEL, (11, 20, 30), {}),
        (MODEL, (20, 10, 30), {}),
        (MODEL, (10, 20, 30, 0), {}),
        (MODEL, (10, 20), {}),
        (MODEL, PROMPT, {"temperature": 1.0, "seed": 1}),
        (MODEL, PROMPT, {"temperature": 1.0, "seed": 2**63 + 1}),
    ],
    ids=["name", "first token", "order", "longer", "shorter", "seed", "large seed"],
)
def test_everything_that_matters_changes_the_output(
    model: OracleModel, prompt: tuple[int, ...], sampling: dict[str, float]
) -> None:
    greedy = SamplingParams(max_tokens=16)
    assert expected_tokens(model, prompt, dataclasses.replace(greedy, **sampling)) != expected_tokens(MODEL, PROMPT, greedy)  # type: ignore[arg-type]


def test_the_seed_of_a_greedy_request_does_not_matter() -> None:
    outputs = [expected_tokens(MODEL, PROMPT, SamplingParams(max_tokens=16, seed=seed)) for seed in (0, 1)]
    assert outputs[0] == outputs[1]


def test_rows_are_whole_words() -> None:
    for fields in ({"row_bytes": 12}, {"row_bytes": 0}, {"num_layers": 0}):
        with pytest.raises(ValueError, match="whole words"):
            OracleModel("m", **fields)


def a_config(**fields: object) -> EngineConfig:
    return EngineConfig(kind="oracle", **fields)  # type: ignore[arg-type]


def test_the_engine_serves_what_the_configuration_says() -> None:
    model = ModelConfig(name="served", source="oracle", context_tokens=1000)
    engine: Engine = create_engine(model, a_config(num_blocks=10, block_tokens=4, max_batch_tokens=8))
    card = card_of(model, None)
    identity = engine.identity
    assert (identity.model, identity.architecture) == ("served", card.architecture)
    assert (identity.vocab_size, identity.context_tokens) == (card.vocab_size, 1000)
    assert (identity.eos_token_ids, identity.tokenizer_digest) == (card.eos_token_ids, card.tokenizer_digest)
    assert (engine.stats().total_blocks, engine.layout.block_tokens) == (10, 4)
    prompt = a_prompt(engine, 20)
    outputs = run(engine, [a_request("r", prompt)])
    assert outputs["r"].tokens == expected_tokens(oracle_model(model), prompt, SamplingParams(max_tokens=8))
    assert len(outputs["r"].progress) == 3
    default = create_engine(ModelConfig(name="served", source="oracle"), a_config())
    assert default.identity.context_tokens == oracle_card().context_tokens


def test_only_the_oracle_source_is_served() -> None:
    with pytest.raises(ModelError):
        create_engine(ModelConfig(name="m", source="demo"), a_config())


def test_costs_are_charged_to_the_clock() -> None:
    clock = ManualClock(start_s=100.0)
    costs = OracleCosts(prefill_tokens_per_s=1000.0, decode_step_s=0.25)
    engine = create_engine(ModelConfig(name="m", source="oracle"), a_config(max_batch_tokens=64, oracle=costs), clock)
    run(engine, [a_request("r", a_prompt(engine, 100), max_tokens=1)])
    assert clock.now_s() == pytest.approx(100.1)
    run(engine, [a_request(f"r{i}", a_prompt(engine, 10, i), max_tokens=4) for i in range(3)])
    assert clock.now_s() == pytest.approx(100.1 + 0.03 + 3 * 0.25), "a step of three decodes costs one step"


def test_on_the_system_clock_steps_take_their_time() -> None:
    clock = SystemClock()
    engine = create_engine(ModelConfig(name="m", source="oracle"), a_config(oracle=OracleCosts(decode_step_s=0.02)), clock)
    started_s = clock.now_s()
    run(engine, [a_request("r", a_prompt(engine, 10), max_tokens=4)])
    assert clock.now_s() - started_s >= 0.06


@pytest.mark.parametrize("seed", range(3))
def test_long_prompts_in_any_shape(seed: int) -> None:
    rng = random.Random(seed)
    engine = create_engine(
        ModelConfig(name="m", source="oracle"),
        a_config(block_tokens=rng.choice([16, 64]), max_batch_tokens=rng.choice([100, 512])),
    )
    requests = [a_request(f"r{i}", a_prompt(engine, 2000 + i, i), max_tokens=20) for i in range(4)]
    outputs = run(engine, requests)
    model = oracle_model(ModelConfig(name="m", source="oracle"))
    for request in requests:
        assert outputs[request.request_id].tokens == expected_tokens_fast(model, request.prompt, request.sampling)
