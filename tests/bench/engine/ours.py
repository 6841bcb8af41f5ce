"""This project's torch engine as a measured child: `python -m tests.bench.engine.ours MODEL_DIR OPTIONS_JSON`."""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

from tests.bench.engine.child import Generate, serve


def load(model_dir: str, options: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    """`options`: dtype, threads, context_tokens, max_batch_tokens, max_running."""
    import torch

    from configs.schema.pools import EngineConfig, ModelConfig
    from workers.engine_api.types import EngineRequest, SamplingParams
    from workers.engines.torch.build import create_engine

    settings = EngineConfig(
        kind="torch",
        threads=options["threads"],
        num_blocks=blocks_for(options["context_tokens"], options["max_running"]),
        max_batch_tokens=options["max_batch_tokens"],
        max_running=options["max_running"],
        prefix_cache=False,
    )
    engine = create_engine(ModelConfig(name="bench", source=model_dir, dtype=options["dtype"]), settings, Path(model_dir))
    numbers = count()

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        outputs: dict[str, list[int]] = {f"r{next(numbers)}": [] for _ in prompts}
        for request_id, prompt in zip(outputs, prompts, strict=True):
            sampling = SamplingParams(max_tokens=max_tokens)
            engine.add(EngineRequest(request_id=request_id, epoch=0, prompt=tuple(prompt), sampling=sampling))
        while engine.has_work():
            result = engine.step()
            if result.failed:
                raise RuntimeError(result.failed[0].message)
            for token in result.tokens:
                outputs[token.request_id].append(token.token_id)
        return list(outputs.values())

    return generate, {"version": "this tree", "torch": torch.__version__, "threads": torch.get_num_threads()}


def blocks_for(context_tokens: int, max_running: int, block_tokens: int = 64) -> int:
    """Blocks that hold one whole context, or the decode batches of the benchmark (512 tokens each), whichever is more."""
    return max(-(-context_tokens // block_tokens), max_running * 512 // block_tokens) + 8


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], json.loads(sys.argv[2])))
