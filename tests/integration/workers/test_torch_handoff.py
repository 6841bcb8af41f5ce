"""Real weights through a real hand-off: both shapes give the tokens of one engine alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from configs.schema.pools import EngineConfig, ModelConfig
from protos.contract.redis_names import pack_tokens
from protos.wire import common
from tests.support.store import FreshStore
from tests.support.worker_world import INGRESS, WorkerWorld, worker_world

torch_models = pytest.importorskip("tests.support.torch_models")


def alone(model_dir: Path, prompts: list[tuple[int, ...]], max_tokens: int) -> list[list[int]]:
    from workers.service.solo import SoloRequest, run_alone

    engine = torch_models.an_engine(model_dir)
    try:
        return run_alone(engine, [SoloRequest(prompt=list(prompt), max_tokens=max_tokens) for prompt in prompts])
    finally:
        engine.close()


async def submit(world: WorkerWorld, request_id: str, prompt: tuple[int, ...], max_tokens: int) -> str:
    spec = common.RequestSpec(
        request_id=request_id, tenant="acme", model="tiny", prompt_token_ids=pack_tokens(prompt),
        sampling=common.Sampling(max_tokens=max_tokens, ignore_eos=True),
    )  # fmt: skip
    await world.store.submit(
        request_id=request_id, body_hash=b"h", spec=spec.SerializeToString(), tenant="acme", model="tiny",
        prompt_tokens=len(prompt), max_tokens=max_tokens, prio=0, timeout_ms=60_000, ingress_id=INGRESS,
        ingress_epoch=world.ingress.epoch, ingress_addr=world.ingress.address, queue_limit=100,
    )  # fmt: skip
    return request_id


@pytest.mark.parametrize("kind", ["mistral-small-4", "llama"])
def test_tokens_do_not_depend_on_the_hand_off(fresh_store: FreshStore, tmp_path: Path, kind: str) -> None:
    from workers.engines.torch.tiny import write_tiny

    model_dir = write_tiny(kind, tmp_path / "model", 7)
    prompts = [torch_models.random_tokens(seed, 30 + 45 * seed) for seed in range(4)]
    expected = alone(model_dir, prompts, 12)
    engine = {"kind": "torch", "num_blocks": 96, "block_tokens": 16, "max_batch_tokens": 64}
    model = ModelConfig(name="tiny", source=str(model_dir), dtype="float32")

    async def scenario() -> None:
        async with worker_world(fresh_store) as world:
            for name, role in (("prefill-0", "prefill"), ("decode-0", "decode")):
                await world.start_worker(name, role, model=model, model_dir=str(model_dir), engine=engine)
            requests = [await submit(world, f"q{i}", prompt, 12) for i, prompt in enumerate(prompts)]
            for request in requests:
                await world.assign(request, "prefill-0", "decode-0")
            for request, output in zip(requests, expected, strict=True):
                await world.ended(request)
                assert world.ingress.of(request).output == output
                assert world.ingress.of(request).timelines[-1].handoff_blocks > 0
            await world.clean()

    assert EngineConfig(**engine)
    asyncio.run(scenario())
