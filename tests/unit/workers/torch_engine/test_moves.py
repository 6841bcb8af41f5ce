"""What changes tokens beyond their KV follows a running sequence to another engine: penalties, biases, grammars, end tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract.driver import run
from tests.contract.engine_move_contract import decode, move
from tests.support.grammars import SCHEMA, json_schema
from tests.support.torch_models import an_engine, random_tokens
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engines.torch.tiny import write_tiny

EOS = 2
SAMPLINGS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.7, "presence_penalty": 0.8, "frequency_penalty": 1.1, "logit_bias": ((40, 3.0),)},
    "grammar": {"grammar": json_schema(SCHEMA), "stop_token_ids": frozenset({EOS})},
    "ends": {"min_tokens": 20, "stop_token_ids": frozenset(range(2, 60))},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dims = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "model", 21, max_position_embeddings=512, **dims)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", SAMPLINGS)
def test_a_move_changes_no_token(folder: Path, kind: str, seed: int) -> None:
    def engine() -> Any:
        return an_engine(folder, num_blocks=100, max_batch_tokens=64, max_running=4)

    sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=seed, **SAMPLINGS[kind])
    request = EngineRequest(request_id="r", epoch=1, prompt=random_tokens(seed, 20), sampling=sampling)
    whole = run(engine(), [request])["r"].tokens
    plain = replace(request, sampling=SamplingParams(max_tokens=60, temperature=1.0, seed=seed))
    assert whole != run(engine(), [plain])["r"].tokens, "the sampling makes a difference"
    for seen, moved_at in ((0, 1), (3, 7), (12, 12)):
        source, target = engine(), engine()
        decode(source, request, moved_at)
        output = move(source, target, replace(request, epoch=2, output=tuple(whole[: min(seen, moved_at)])))
        assert output + run(target)["r"].tokens == whole
        target.check_integrity()
        source.check_integrity()
