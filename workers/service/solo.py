"""One engine, alone: the same prompts without hand-off, network or store. What disaggregated output is compared with.

    python -m workers.service.solo < job.json

The job is `{"model": ModelConfig, "model_dir": path or null, "engine": EngineConfig, "requests": [{"prompt": ids,
"max_tokens": n, "temperature": x, "seed": s, "stop_token_ids": ids}]}`; stdout gets `{"outputs": [ids, ...]}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from pydantic import Field

from configs.schema.base import Section
from configs.schema.pools import EngineConfig, ModelConfig
from protos.contract.errors import EngineFailure
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, Phase, SamplingParams
from workers.engine_api.waiting import WorkWaiter
from workers.service.build import build_engine


class SoloRequest(Section):
    """One prompt of a job; the greedy defaults need no seed."""

    prompt: Annotated[list[int], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: list[int] = Field(default_factory=list)


class SoloJob(Section):
    """A model, an engine and the prompts to run on it, all in one batch."""

    model: ModelConfig
    model_dir: str | None = None
    engine: EngineConfig
    requests: Annotated[list[SoloRequest], Field(min_length=1, max_length=10_000)]


def run_alone(engine: Engine, requests: list[SoloRequest]) -> list[list[int]]:
    """The output tokens of each request, in order. Raises EngineFailure when the engine gives one up."""
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(requests))}
    for index, request in enumerate(requests):
        sampling = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop_token_ids=frozenset(request.stop_token_ids),
        )
        engine.add(
            EngineRequest(
                request_id=str(index), epoch=1, prompt=tuple(request.prompt), sampling=sampling, phase=Phase.FULL
            )
        )  # fmt: skip
    waiter = WorkWaiter(engine)
    while waiter.wait():
        result = engine.step()
        for failed in result.failed:
            raise EngineFailure(f"request {failed.request_id}: {failed.message}")
        for token in result.tokens:
            outputs[token.request_id].append(token.token_id)
    return [outputs[str(index)] for index in range(len(requests))]


def main() -> None:
    """Reads a job from stdin, writes the outputs to stdout."""
    job = SoloJob.model_validate_json(sys.stdin.read())
    alone = job.engine.model_copy(update={"disk_cache": None})  # its folder belongs to a worker
    engine = build_engine(job.model, alone, Path(job.model_dir) if job.model_dir else None)
    try:
        json.dump({"outputs": run_alone(engine, job.requests)}, sys.stdout)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
