"""The torch engine draws the same tokens whether evicted blocks come back from the host's memory or are computed again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.torch_models import an_engine, random_tokens, run_all
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engines.torch.tiny import write_tiny

SAMPLING = SamplingParams(max_tokens=6, temperature=0.8, seed=11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral-small-4"])
def test_tokens_are_equal_with_and_without_the_host_cache(family: str, dtype: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / "model", 21, max_position_embeddings=512)
    shape = {"num_blocks": 10, "block_tokens": 8, "max_batch_tokens": 32, "prefix_cache": True}
    engines = [an_engine(folder, dtype, host_cache_gb=size, **shape) for size in (0.0, 0.05)]
    prompts = [random_tokens(seed, 45) for seed in range(4)]
    outputs: list[list[list[int]]] = [[], []]
    for turn, which in enumerate([0, 1, 2, 3, 0, 2, 1, 3]):
        for engine, taken in zip(engines, outputs, strict=True):
            request = EngineRequest(request_id=f"r{turn}", epoch=1, prompt=prompts[which], sampling=SAMPLING)
            taken.append(run_all(engine, [request])[f"r{turn}"])
            engine.check_integrity()
    without, tiered = (engine.stats() for engine in engines)
    assert outputs[0] == outputs[1]
    assert (without.host_blocks, without.host_restored_tokens) == (0, 0)
    assert tiered.host_restored_tokens >= 4 * 32
    assert tiered.prefill_tokens <= without.prefill_tokens - 4 * 32
    assert tiered.leaked_blocks == 0
    for engine in engines:
        engine.close()
