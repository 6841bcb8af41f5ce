"""A seeded request gives the same tokens alone, in company, handed over, preempted, and continued elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.torch_models import an_engine, hand_off, random_tokens, run_all
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engines.torch.tiny import write_tiny

DRAWN = SamplingParams(
    max_tokens=24,
    temperature=0.6,
    seed=2**60 + 7,
    top_p=0.95,
    repetition_penalty=1.3,
    presence_penalty=-1.0,
    frequency_penalty=0.4,
    logit_bias=((20, 1.5), (40, -3.0)),
)
RULES = {
    "penalties": DRAWN,
    "plain": SamplingParams(max_tokens=24, temperature=1.2, seed=5),
    "top_k": SamplingParams(max_tokens=24, temperature=0.9, seed=5, top_k=30, min_p=0.01),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "model", 9)


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_same_tokens_everywhere(folder: Path, name: str) -> None:
    request = EngineRequest(request_id="me", epoch=1, prompt=random_tokens(1, 50), sampling=RULES[name])
    expected = run_all(an_engine(folder), [request])["me"]
    assert len(set(expected)) > 5

    company = [
        replace(request, request_id=f"o{i}", prompt=random_tokens(20 + i, 30 + 7 * i), sampling=replace(RULES[rule], seed=i))
        for i, rule in enumerate([*RULES, *RULES])
    ]
    crowd = run_all(an_engine(folder), [*company[:3], request, *company[3:]])
    assert crowd["me"] == expected

    assert hand_off(an_engine(folder), an_engine(folder), request) == expected

    tight = an_engine(folder, num_blocks=24)
    assert run_all(tight, [*company, request])["me"] == expected
    assert tight.stats().preemptions > 0

    for known in (1, 11, 23):
        continued = replace(request, output=tuple(expected[:known]))
        assert run_all(an_engine(folder), [continued])["me"] == expected[known:]


def test_penalties_change_the_tokens(folder: Path) -> None:
    request = EngineRequest(request_id="me", epoch=1, prompt=random_tokens(1, 50), sampling=DRAWN)
    plain = replace(DRAWN, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    penalised = run_all(an_engine(folder), [request])["me"]
    assert penalised != run_all(an_engine(folder), [replace(request, sampling=plain)])["me"]
