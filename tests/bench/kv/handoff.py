"""Hand-offs of the torch engine beside the same prompts without one: what of the transfer shows, and what it costs.

Two clusters of real worker processes, started as `autan up` starts them and driven in turns with equal prompts: one prefill
and one decode worker, and one worker that does both. Every worker computes with one thread; ingress, core and client share
this process. Prompts are 24 tokens short of their round number, so that the last block is partly filled.

Hidden is transfer time (the sender reads, digests or writes KV of the request, or waits for credit) that lies before the end
of the last prefill step. Two shares of it: of all such time, and of that before plus the whole tail, which is the end of
the prefill to the commit, whatever it is spent on.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.schema.cluster import ClusterConfig
from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.cli.up import make_launcher
from orchestrator.client import AsyncClient, Delta, Finished
from protos.wire import common
from tests.bench.engine.models import MAKERS
from tests.bench.report import OUT, Row, row

MODELS = ("smollm2", "tiny4")
SHORT_BY = 24
MAX_TOKENS = 32
_FIRST_ID, _VOCAB = 16, 49152
_BLOCK_TOKENS = 64
_POSITIONS = {"smollm2": 16_384, "tiny4": 65_536}  # of the measured copies; one thread computes no more in a window


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as its client sees it. Seconds; `arrivals_s` counts from the submit and has one time for each token."""

    arrivals_s: tuple[float, ...]
    timeline: common.Timeline
    token_ids: tuple[int, ...]

    @property
    def ttft_s(self) -> float:
        """Submit to first token."""
        return self.arrivals_s[0]

    @property
    def second_s(self) -> float:
        """First to second token."""
        return self.arrivals_s[1] - self.arrivals_s[0]

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """The distances of the tokens behind the second."""
        return tuple(b - a for a, b in pairwise(self.arrivals_s[1:]))

    @property
    def hidden_of_transfer(self) -> float:
        """Share of the transfer time before the end of the prefill; see the module."""
        return self.timeline.handoff_hidden_s / self.timeline.handoff_s

    @property
    def hidden_of_all(self) -> float:
        """As `hidden_of_transfer`, with the whole tail as transfer time."""
        return self.timeline.handoff_hidden_s / (self.timeline.handoff_hidden_s + self.timeline.handoff_exposed_s)


def model_dir(name: str) -> Path:
    """The checkpoint of the engine benchmark, with positions for the longest prompt."""
    source = MAKERS[name](OUT / "models")
    copy = OUT / "models" / f"{name}-{_POSITIONS[name]}"
    if not copy.exists():
        config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": _POSITIONS[name]}
        staging = Path(tempfile.mkdtemp(prefix=".copy-", dir=copy.parent))
        (staging / "config.json").write_text(json.dumps(config, indent=1))
        (staging / "model.safetensors").symlink_to((source / "model.safetensors").resolve())
        staging.rename(copy)
    return copy


def fits(model: str, prompt_tokens: int) -> bool:
    """Whether the model has positions for it."""
    return prompt_tokens + MAX_TOKENS <= _POSITIONS[model]


def cluster_config(name: str, directory: Path, prompt_tokens: int, chunk_tokens: int, roles: Sequence[str]) -> ClusterConfig:
    """One instance of each role, over plain processes."""
    blocks = -(-(prompt_tokens + MAX_TOKENS) // _BLOCK_TOKENS) + 8  # one round touches all of them
    engine = {
        "kind": "torch", "threads": 1, "block_tokens": _BLOCK_TOKENS, "num_blocks": blocks,
        "max_batch_tokens": chunk_tokens,
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": name,
        "model": {"name": "bench", "source": str(directory), "dtype": "bfloat16"},
        "pools": [{"name": role, "role": role, "engine": engine} for role in roles],
        "launcher": {"kind": "subprocess"},
        "ingress": {"address": "127.0.0.1:0"},
    }
    return ClusterConfig.model_validate(values)


@asynccontextmanager
async def clusters(directory: Path, prompt_tokens: int, chunk_tokens: int) -> AsyncIterator[dict[str, AsyncClient]]:
    """Both clusters, by `handed over` and `alone`; gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="autan-"))
    try:
        async with AsyncExitStack() as stack:
            found = {}
            for name, roles in (("handed over", ("prefill", "decode")), ("alone", ("combined",))):
                config = cluster_config(name.partition(" ")[0], directory, prompt_tokens, chunk_tokens, roles)
                cluster = await stack.enter_async_context(LocalCluster(config, make_launcher, home=home))
                found[name] = await stack.enter_async_context(AsyncClient(cluster.endpoint))
            yield found
    finally:
        shutil.rmtree(home, ignore_errors=True)


async def run_one(client: AsyncClient, prompt: list[int]) -> Seen:
    """A greedy request of MAX_TOKENS tokens. Tokens that come in one event share its time."""
    started_s = time.monotonic()
    arrivals: list[float] = []
    token_ids: list[int] = []
    timeline = common.Timeline()
    options: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True}
    async for event in client.generate(token_ids=prompt, **options):
        match event:
            case Delta():
                arrivals += [time.monotonic() - started_s] * len(event.token_ids)
                token_ids += event.token_ids
            case Finished():
                timeline.CopyFrom(event.timeline)
            case _:
                pass
    if len(token_ids) != MAX_TOKENS:
        raise RuntimeError(f"{len(token_ids)} tokens of {MAX_TOKENS}")
    return Seen(tuple(arrivals), timeline, tuple(token_ids))


async def _samples(model: str, prompt_tokens: int, chunk_tokens: int, rounds: int) -> dict[str, list[Seen]]:
    rng = random.Random(prompt_tokens)
    found: dict[str, list[Seen]] = {}
    async with clusters(model_dir(model), prompt_tokens, chunk_tokens) as clients:
        for round_ in range(-1, rounds):  # the first one warms both up
            prompt = [rng.randrange(_FIRST_ID, _VOCAB) for _ in range(prompt_tokens)]
            order = list(clients) if round_ % 2 else list(reversed(clients))
            seen = {name: await run_one(clients[name], prompt) for name in order}
            if len({one.token_ids for one in seen.values()}) != 1:
                raise RuntimeError(f"{model}, {prompt_tokens} tokens: the outputs differ")
            if round_ >= 0:
                for name, one in seen.items():
                    found.setdefault(name, []).append(one)
    return found


def rows_of(case: str, samples: Mapping[str, Sequence[Seen]]) -> list[Row]:
    """The figures of one model and prompt size; the twin without a hand-off stands beside them as the peer."""
    handed, alone = samples["handed over"], samples["alone"]
    pairs = list(zip(handed, alone, strict=True))
    ttft = [1000 * one.ttft_s for one in handed]
    twin = statistics.median(1000 * one.ttft_s for one in alone)
    itl_s, twin_itl_s = _itl_s(handed), _itl_s(alone)
    second = row("second token after the first", case, "ITL", [one.second_s / itl_s for one in handed])
    twin_second = statistics.median(one.second_s / twin_itl_s for one in alone)
    return [
        _beside(row("TTFT", case, "ms", ttft), twin),
        row("TTFT over that without hand-off", case, "ratio", [one.ttft_s / other.ttft_s for one, other in pairs]),
        _beside(second, twin_second),
        row("second token after the first", case, "ms", [1000 * one.second_s for one in handed]),
        _beside(row("ITL behind the second", case, "ms", [1000 * itl_s]), 1000 * twin_itl_s),
        row("transfer hidden behind prefill", case, "%", [100 * one.hidden_of_transfer for one in handed]),
        row("hidden, the tail counted whole", case, "%", [100 * one.hidden_of_all for one in handed]),
        row("end of prefill to commit", case, "ms", [1000 * one.timeline.handoff_exposed_s for one in handed]),
        row("transfer time", case, "ms", [1000 * one.timeline.handoff_s for one in handed]),
        row("bytes handed over", case, "MB", [one.timeline.handoff_bytes / 1e6 for one in handed]),
    ]


def _itl_s(requests: Sequence[Seen]) -> float:
    """The median over all rounds: tokens that reach the client together would spoil that of one request."""
    return statistics.median(gap for one in requests for gap in one.gaps_s)


def _beside(one: Row, twin: float) -> Row:
    return Row(
        one.metric, one.case, one.unit, one.ours, one.runs, one.spread, "without hand-off", "this tree", twin, one.ours / twin
    )


def measure(model: str, prompt_tokens: int, chunk_tokens: int, rounds: int) -> list[Row]:
    """Alternating rounds of one model and prompt size. Raises RuntimeError when the two ever answer differently."""
    samples = asyncio.run(_samples(model, prompt_tokens, chunk_tokens, rounds))
    return rows_of(f"{model}, {prompt_tokens} tokens", samples)
