"""What the shared pool costs the engine: its pages are of 4 KiB where the kernel has no larger ones for files in memory.

Two engines of one process, alike but for the memory of their pools, decode the same requests in turns.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from configs.schema.pools import EngineConfig, ModelConfig
from tests.bench.engine.models import MAKERS
from tests.bench.report import OUT, Row, row
from workers.engine_api.pool_memory import PoolMemory
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, SamplingParams

_BATCH, _CONTEXT_TOKENS, _STEPS, _WARM_STEPS = 8, 1024, 40, 8


def measure(model: str, rounds: int) -> list[Row]:
    """Milliseconds of a decode step at batch 8 behind 1,024 tokens each, shared pool beside plain memory."""
    folder = MAKERS[model](OUT / "models")
    engines = {shared: _engine(folder, shared) for shared in (True, False)}
    taken: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for shared, engine in engines.items():
            taken[shared].append(_step_ms(engine, number))
    plain = median(taken[False])
    ours = row("decode step, shared pool", f"{model}, batch {_BATCH}, {_CONTEXT_TOKENS} tokens", "ms", taken[True])
    return [replace(ours, peer="plain memory", peer_version="of this tree", peer_value=plain, ratio=ours.ours / plain)]


def _engine(folder: Path, shared: bool) -> Engine:
    from workers.engines.torch.build import create_engine

    settings = EngineConfig(
        kind="torch", threads=1, num_blocks=_BATCH * (_CONTEXT_TOKENS // 64 + 2), max_batch_tokens=2048, max_running=_BATCH,
        prefix_cache=False,
    )  # fmt: skip
    model = ModelConfig(name="bench", source=str(folder), dtype="bfloat16")
    return create_engine(model, settings, folder, memory=PoolMemory(shared=shared))


def _step_ms(engine: Engine, number: int) -> float:
    """The median of the decode steps of one batch."""
    names = [f"r{number}-{each}" for each in range(_BATCH)]
    for each, name in enumerate(names):
        prompt = tuple(range(each, each + _CONTEXT_TOKENS - _STEPS))
        sampling = SamplingParams(max_tokens=_STEPS, min_tokens=_STEPS)
        engine.add(EngineRequest(request_id=name, epoch=0, prompt=prompt, sampling=sampling))
    steps: list[float] = []
    while engine.has_work():
        started_s = time.monotonic()
        result = engine.step()
        elapsed_s = time.monotonic() - started_s
        assert not result.failed, result.failed
        if result.batch_tokens == _BATCH:
            steps.append(elapsed_s)
    return median(steps[_WARM_STEPS:]) * 1000
