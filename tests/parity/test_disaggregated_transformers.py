"""Token for token with transformers through the whole disaggregated path: two processes, real hand-offs, fp32, greedy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.schema.cluster import ClusterConfig
from orchestrator.cli.demo_prompts import incident_log
from tests.support.cluster import Watched, instances_of, no_block_left, random_prompt, run, running, watch
from tests.support.torch_models import transformers_choices, transformers_greedy, transformers_twin
from workers.engines.torch.tiny import write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

LENGTHS = [1, 2, 3, 7, 16, 33, 63, 64, 65, 100, 128, 129, 200, 256, 300, 512, 700, 1000, 1500, 2000]
MAX_TOKENS, CHUNK_TOKENS, BLOCK_TOKENS = 64, 512, 64
AT_LEAST_CHUNKS = 3

Judge = Callable[[Any, list[int], list[int]], list[int]]


def config_for(name: str, model_dir: Path) -> ClusterConfig:
    engine = {
        "kind": "torch", "threads": 1, "block_tokens": BLOCK_TOKENS, "num_blocks": 192, "max_batch_tokens": CHUNK_TOKENS,
        "max_running": 32,
    }  # fmt: skip
    return ClusterConfig.model_validate(
        {
            "name": name,
            "model": {"name": name, "source": str(model_dir), "dtype": "float32"},
            "pools": [
                {"name": "prefill", "role": "prefill", "engine": engine},
                {"name": "decode", "role": "decode", "engine": engine},
            ],
            "launcher": {"kind": "subprocess"},
            "ingress": {"address": "127.0.0.1:0"},
        }
    )


async def through_the_cluster(config: ClusterConfig, prompts: list[list[int]]) -> list[Watched]:
    """All prompts at once; checks the metrics of the hand-offs and that nothing is left."""
    async with running(config) as (_, client):
        seen = await asyncio.gather(*(watch(client, prompt, MAX_TOKENS, ignore_eos=True) for prompt in prompts))
        await no_block_left(client)
        stats = {name: one.stats for name, one in (await instances_of(client)).items()}
    moved = sum(one.timeline.handoff_blocks + one.timeline.handoff_reused_blocks for one in seen)
    assert moved == sum(-(-len(prompt) // BLOCK_TOKENS) for prompt in prompts), "every block came by hand-off"
    assert stats["prefill-0"].kv_blocks_sent == stats["decode-0"].kv_blocks_received > 0
    assert stats["prefill-0"].handoffs_committed == len(prompts)
    for prompt, one in zip(prompts, seen, strict=True):
        if len(prompt) > (AT_LEAST_CHUNKS - 1) * CHUNK_TOKENS:
            assert one.timeline.prefill_chunks >= AT_LEAST_CHUNKS
    return list(seen)


def generated(model: Any, prompt: list[int], output: list[int]) -> list[int]:
    """A greedy generation by transformers; `transformers_choices` gives the same in one pass."""
    return transformers_greedy(model, prompt, len(output))


def compare(config: ClusterConfig, model: Any, prompts: list[list[int]], judge: Judge) -> None:
    seen: list[Watched] = []

    async def body() -> None:
        seen.extend(await through_the_cluster(config, prompts))

    run(body(), 300.0)
    wrong = [
        len(prompt)
        for prompt, one in zip(prompts, seen, strict=True)
        if len(one.token_ids) != MAX_TOKENS or one.token_ids != judge(model, prompt, one.token_ids)
    ]
    assert not wrong, f"prompts of these lengths differ: {wrong}"


def test_the_demo_model(demo_model_dir: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_model_dir / "tokenizer.json"))
    text: list[int] = tokenizer.encode(incident_log(200), add_special_tokens=False).ids
    prompts = [text[17 * at : 17 * at + length] for at, length in enumerate(LENGTHS)]
    assert [len(prompt) for prompt in prompts] == LENGTHS
    compare(config_for("demo-model", demo_model_dir), transformers_twin(demo_model_dir), prompts, transformers_choices)


def test_a_tiny_mistral_small_4(tmp_path: Path) -> None:
    model_dir = write_tiny("mistral-small-4", tmp_path / "tiny", seed=4)
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    compare(config_for("tiny", model_dir), transformers_twin(model_dir), prompts, generated)
