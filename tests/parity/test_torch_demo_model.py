"""The demo model as imported from its GGUF file, against transformers on the same folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.torch_models import an_engine, hand_off, transformers_choices, transformers_twin
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, SamplingParams

PARAGRAPH = "The quick brown fox, aged 27, jumps over the lazy dog near the café; nobody knows why it does so. "
CODE = "def average(numbers):\n    total = 0\n    for n in numbers:\n        total += n\n    return total / len(number)\n"


@pytest.fixture(scope="module")
def twin(demo_model_dir: Path) -> Any:
    return transformers_twin(demo_model_dir)


@pytest.fixture(scope="module")
def engines(demo_model_dir: Path) -> Iterator[tuple[Engine, Engine]]:
    fields = {"block_tokens": 64, "num_blocks": 128, "max_batch_tokens": 512}
    pair = an_engine(demo_model_dir, **fields), an_engine(demo_model_dir, **fields)
    yield pair
    for engine in pair:
        engine.close()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("text", "num_tokens"),
    [("Hello", 1), ("What is the capital of France?", 7), (CODE, 29), (PARAGRAPH * 30, 700), (PARAGRAPH * 90, 2000)],
    ids=["1", "7", "29", "700", "2000"],
)
def test_greedy_tokens_through_a_hand_off(
    text: str, num_tokens: int, demo_model_dir: Path, twin: Any, engines: tuple[Engine, Engine]
) -> None:
    prompt = Tokenizer.from_file(str(demo_model_dir / "tokenizer.json")).encode(text).ids[:num_tokens]
    assert len(prompt) == num_tokens
    before = engines[0].stats()
    request = EngineRequest(request_id=f"r{num_tokens}", epoch=1, prompt=tuple(prompt), sampling=SamplingParams(max_tokens=64))
    output = hand_off(*engines, request)
    assert len(output) == 64
    assert output == transformers_choices(twin, prompt, output)
    after = engines[0].stats()
    assert after.prefill_chunks - before.prefill_chunks >= min(num_tokens // 512, 3)
    assert (after.used_blocks, engines[1].stats().used_blocks) == (0, 0)
