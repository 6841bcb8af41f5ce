"""Oracle cluster, one prefill and one decode worker: requests/s in a burst, and the latency that the path adds to the engine.

Added latency of a request is TTFT at the ingress minus the time between pick and first token: submit, queue, decision, assign,
pick, and the way of the first token back. It is taken at half the request rate of the burst, open loop.
"""

from __future__ import annotations

import asyncio
import random
import time

from orchestrator.client import AsyncClient
from tests.bench.report import Row, percentile, publish, row
from tests.support.cluster import Watched, no_block_left, oracle_config, random_prompt, running, watch

REQUESTS, PROMPT_TOKENS, MAX_TOKENS, ROUNDS = 200, 2000, 64, 3


async def _burst(client: AsyncClient, round_: int) -> float:
    prompts = [random_prompt(10_000 * round_ + seed, PROMPT_TOKENS) for seed in range(REQUESTS)]
    started_s = time.monotonic()
    await asyncio.gather(*(watch(client, prompt, MAX_TOKENS) for prompt in prompts))
    took_s = time.monotonic() - started_s
    await no_block_left(client)
    return REQUESTS / took_s


async def _steady(client: AsyncClient, round_: int, rate: float) -> list[float]:
    """Added latencies in ms at `rate` requests/s with exponential gaps."""
    rng = random.Random(round_)
    tasks: list[asyncio.Task[Watched]] = []
    for seed in range(REQUESTS):
        prompt = random_prompt(10_000_000 + 10_000 * round_ + seed, PROMPT_TOKENS)
        tasks.append(asyncio.create_task(watch(client, prompt, MAX_TOKENS)))
        await asyncio.sleep(rng.expovariate(rate))
    seen = await asyncio.gather(*tasks)
    return [1000 * (one.timeline.ttft_s - one.timeline.prefill_s) for one in seen]


async def _measure() -> list[Row]:
    rates: list[float] = []
    p50: list[float] = []
    p99: list[float] = []
    async with running(oracle_config("bench")) as (_, client):
        await _burst(client, 0)
        for round_ in range(1, ROUNDS + 1):
            rates.append(await _burst(client, round_))
        for round_ in range(1, ROUNDS + 1):
            added_ms = await _steady(client, round_, sorted(rates)[ROUNDS // 2] / 2)
            p50.append(percentile(added_ms, 0.5))
            p99.append(percentile(added_ms, 0.99))
    case = f"{PROMPT_TOKENS} in, {MAX_TOKENS} out"
    return [
        row("requests per second, burst of 200", case, "requests/s", rates),
        row("output tokens per second, burst", case, "tokens/s", [MAX_TOKENS * rate for rate in rates]),
        row("added latency p50 at half load", case, "ms", p50),
        row("added latency p99 at half load", case, "ms", p99),
    ]


def main() -> None:
    """Runs the benchmark."""
    rows = asyncio.run(_measure())
    publish("load", rows, engine="oracle, no model time", instances="1 prefill, 1 decode", client="one process, this machine")
