"""Sampling through real sockets: a client, an ingress, a real hand-off between two torch workers."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest

from configs.schema.cluster import ClusterConfig
from orchestrator.client import Accepted, AsyncClient, Delta, Event, Finished
from orchestrator.ingress.fanout import choice_seed
from protos.contract.errors import Cancelled, InvalidRequest, UnknownRequest
from tests.support.cluster import oracle_config, running

torch_models = pytest.importorskip("tests.support.torch_models")

PROMPT = torch_models.random_tokens(3, 40)
COMMON = {"token_ids": PROMPT, "max_tokens": 12, "ignore_eos": True}
DRAWN = {
    "temperature": 0.5,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
    "presence_penalty": -2.0,
    "frequency_penalty": 0.3,
    "seed": 77,
}


def torch_config(model_dir: Path) -> ClusterConfig:
    engine = {"kind": "torch", "num_blocks": 96, "block_tokens": 16, "max_batch_tokens": 64, "max_running": 16}
    model = {"name": "tiny", "source": str(model_dir), "dtype": "float32"}
    return oracle_config("sampling", engine=engine, model=model)


def alone(model_dir: Path, **fields: object) -> list[int]:
    """What one engine gives, of which the tests know that it samples as the slow twin does."""
    from workers.engine_api.types import EngineRequest, SamplingParams

    engine = torch_models.an_engine(model_dir)
    try:
        sampling = SamplingParams(max_tokens=12, **fields)  # type: ignore[arg-type]
        request = EngineRequest(request_id="a", epoch=1, prompt=PROMPT, sampling=sampling)
        tokens: list[int] = torch_models.run_all(engine, [request])["a"]
        return tokens
    finally:
        engine.close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from workers.engines.torch.tiny import write_tiny

    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "model", 5)


def test_penalties_bias_logprobs_and_choices(model_dir: Path) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(90), running(torch_config(model_dir)) as (_, client):
            await _drawn_alone_and_together(client, model_dir)
            await _bias_and_logprobs(client, model_dir)
            await _choices(client)

    asyncio.run(scenario())


async def _drawn_alone_and_together(client: AsyncClient, model_dir: Path) -> None:
    expected = alone(model_dir, **DRAWN)
    assert expected != alone(
        model_dir, **{**DRAWN, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    )
    first = await client.complete(**COMMON, **DRAWN)
    assert list(first.token_ids) == expected
    assert first.timeline.handoff_blocks > 0
    others = [client.complete(**{**COMMON, "temperature": 0.9, "seed": seed, "top_k": seed}) for seed in range(6)]
    again, *_ = await asyncio.gather(client.complete(**COMMON, **DRAWN), *others)
    assert list(again.token_ids) == expected


async def _bias_and_logprobs(client: AsyncClient, model_dir: Path) -> None:
    greedy = await client.complete(**COMMON, logprobs=3)
    assert list(greedy.token_ids) == alone(model_dir)
    assert len(greedy.logprobs) == 12
    for token_id, found in zip(greedy.token_ids, greedy.logprobs, strict=True):
        assert found is not None
        assert len(found.top_ids) == 3
        assert (found.top_ids[0], found.top_logprobs[0]) == (token_id, found.logprob)
        assert sorted(found.top_logprobs, reverse=True) == list(found.top_logprobs)
        assert math.exp(found.logprob) <= 1
    biased = await client.complete(**COMMON, logit_bias={greedy.token_ids[0]: -100, 9: 100}, logprobs=0)
    assert set(biased.token_ids) == {9}
    (found,) = {one.top_ids for one in biased.logprobs if one is not None}
    assert found == ()
    assert all(one is not None and one.logprob < -0.1 for one in biased.logprobs)  # of the raw logits
    with pytest.raises(InvalidRequest, match="logit_bias"):
        await client.complete(**COMMON, logit_bias={10**6: 1.0})


async def _choices(client: AsyncClient) -> None:
    drawn = {**COMMON, "temperature": 1.3, "seed": 5}
    answers = await client.complete_all(**drawn, n=3, request_id="three", logprobs=1)
    assert [answer.request_id for answer in answers] == ["three.0", "three.1", "three.2"]
    assert [answer.seed for answer in answers] == [5, choice_seed(5, 1), choice_seed(5, 2)]
    assert len({answer.token_ids for answer in answers}) == 3
    assert (await client.complete(**drawn)).token_ids == answers[0].token_ids
    assert (await client.complete(**{**drawn, "seed": answers[2].seed})).token_ids == answers[2].token_ids
    again = await client.complete_all(**drawn, n=3, request_id="three", logprobs=1)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in answers]
    resumed = [event async for event in client.resume("three.1", 4)]
    assert tokens_of(resumed) == list(answers[1].token_ids[4:])
    assert all(one is None for event in resumed if isinstance(event, Delta) for one in event.logprobs)


def tokens_of(events: list[Event]) -> list[int]:
    return [token_id for event in events if isinstance(event, Delta) for token_id in event.token_ids]


def test_choices_end_together_and_the_oracle_has_no_logits() -> None:
    async def scenario() -> None:
        config = oracle_config("choices", engine={"oracle": {"decode_step_s": 0.005}})
        async with asyncio.timeout(60), running(config) as (_, client):
            stream = client.generate("hello", n=4, request_id="four", max_tokens=5000, ignore_eos=True, temperature=1.0)
            seen: dict[int, list[int]] = {choice: [] for choice in range(4)}
            with pytest.raises(Cancelled):
                async for event in stream:
                    assert not isinstance(event, Finished)
                    if isinstance(event, Accepted):
                        assert event.request_id == f"four.{event.choice}"
                    else:
                        assert event.first_index == len(seen[event.choice])
                        seen[event.choice] += event.token_ids
                    if all(len(ids) > 3 for ids in seen.values()):
                        await client.cancel("four")
            live = {request.request_id for request in await client.requests()}
            assert not live & {f"four.{choice}" for choice in range(4)}
            with pytest.raises(UnknownRequest):
                await client.cancel("nobody")
            for fields in ({"logprobs": 1}, {"repetition_penalty": 1.1}, {"logit_bias": {5: 1.0}}):
                with pytest.raises(InvalidRequest, match="no logits"):
                    await client.complete("hello", **fields)
            with pytest.raises(InvalidRequest, match="n: 17"):
                await client.complete_all("hello", n=17)
            with pytest.raises(InvalidRequest, match="request_id"):
                await client.complete_all("hello", n=2, request_id="x" * 62)

    asyncio.run(scenario())
