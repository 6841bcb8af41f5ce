"""The clients of a soak: random requests, each judged against the oracle by what its client saw."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import grpc.aio

from configs.schema.cluster import ClusterConfig
from orchestrator.client import Accepted, AsyncClient, Delta, Finished
from protos.contract.errors import AutanError
from protos.rpc import inference_pb2_grpc
from protos.wire import inference
from tests.support.cluster import random_prompt
from workers.engine_api.types import SamplingParams
from workers.engines.oracle.build import oracle_model
from workers.engines.oracle.reference import expected_tokens_fast

PREFIXES, PREFIX_TOKENS = 4, 400
MAX_PROMPT_TOKENS, MAX_OUTPUT_TOKENS = 1500, 120
FINAL_WAIT_S = 20.0


class Kind(StrEnum):
    """What the client does with its request."""

    PLAIN = "plain"
    DEADLINE = "deadline"
    CANCEL = "cancel"
    LEAVE = "leave"  # closes the stream as the client library does: cancels
    DROP = "drop"  # the call ends without a word
    RESUME = "resume"  # a second client reads along from an index
    DROP_RESUME = "drop_resume"  # the call ends without a word, then somebody resumes
    DUPLICATE = "duplicate"  # two clients submit the same
    CONFLICT = "conflict"  # two clients submit different requests under one id


WEIGHTS = {
    Kind.PLAIN: 30, Kind.DEADLINE: 10, Kind.CANCEL: 12, Kind.LEAVE: 8, Kind.DROP: 8, Kind.RESUME: 12,
    Kind.DROP_RESUME: 8, Kind.DUPLICATE: 8, Kind.CONFLICT: 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One request, drawn before it runs."""

    request_id: str
    kind: Kind
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    timeout_s: float
    delay_s: float
    share: float
    priority: int

    def options(self) -> dict[str, Any]:
        """The arguments of `AsyncClient.generate`."""
        return {
            "token_ids": list(self.prompt), "max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed,
            "timeout_s": self.timeout_s, "priority": self.priority, "request_id": self.request_id,
        }  # fmt: skip

    def expected(self, config: ClusterConfig) -> list[int]:
        """The whole right answer."""
        sampling = SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed)
        return expected_tokens_fast(oracle_model(config.model), self.prompt, sampling)


def draw_plan(rng: random.Random, request_id: str) -> Plan:
    """The next request of a client; the same for the same state of `rng`."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    length = rng.choice([rng.randint(1, 64), rng.randint(1, 600), rng.randint(600, MAX_PROMPT_TOKENS)])
    prompt = random_prompt(rng.randrange(1 << 30), length)
    if rng.random() < 0.4:
        prompt = (random_prompt(rng.randrange(PREFIXES), PREFIX_TOKENS) + prompt)[:MAX_PROMPT_TOKENS]
    return Plan(
        request_id=request_id,
        kind=kind,
        prompt=tuple(prompt),
        max_tokens=rng.choice([1, rng.randint(1, 20), rng.randint(20, MAX_OUTPUT_TOKENS)]),
        temperature=rng.choice([0.0, 0.8]),
        seed=rng.randrange(1 << 32),
        timeout_s=rng.uniform(0.02, 1.5) if kind is Kind.DEADLINE else 0.0,
        delay_s=rng.expovariate(3.0),
        share=rng.random(),
        priority=rng.choice([-1, 0, 0, 1]),
    )


@dataclass(slots=True)
class Seen:
    """One stream as its client saw it."""

    plan: Plan
    what: str
    first_index: int = 0
    tokens: list[int] = field(default_factory=list)
    reason: str = ""
    error: AutanError | None = None
    left: bool = False
    from_memory: bool = False  # the store was away when its end was told
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0

    def __str__(self) -> str:
        end = self.reason or ("left" if self.left else f"{type(self.error).__name__}: {self.error}")
        return f"{self.plan.request_id} {self.plan.kind} {self.what} [{self.first_index}+{len(self.tokens)}] {end}"

    def check(self, config: ClusterConfig) -> None:
        """The tokens are those of the oracle, from the index asked for; all of them when the stream finished."""
        expected = self.plan.expected(config)[self.first_index :]
        assert self.tokens == expected[: len(self.tokens)], f"{self}: wrong tokens"
        assert not self.reason or len(self.tokens) == len(expected), f"{self}: finished with {len(self.tokens)}/{len(expected)}"


class Requester:
    """Runs plans against one cluster and keeps what was seen."""

    def __init__(
        self,
        config: ClusterConfig,
        client: AsyncClient,
        second: AsyncClient,
        wait_s: float,
        is_degraded: Callable[[], bool],
    ) -> None:
        """No stream may last longer than `wait_s`; `is_degraded` is true while the ingress shows tokens from memory."""
        self._is_degraded = is_degraded
        self._config = config
        self._client, self._second = client, second
        self._wait_s = wait_s
        self.seen: list[Seen] = []

    async def run(self, plan: Plan) -> list[Seen]:
        """One request with everything that its kind asks for, and how it ended in the end."""
        try:
            async with asyncio.timeout(self._wait_s):
                mine = await self._act(plan)
        except TimeoutError:
            raise AssertionError(f"{plan.request_id} ({plan.kind}): no end in {self._wait_s} s") from None
        for one in mine:
            one.check(self._config)
        return mine

    def of(self, plan: Plan) -> list[Seen]:
        """Every stream of a request."""
        return [one for one in self.seen if one.plan is plan]

    def forget(self, plan: Plan) -> None:
        """Keeps nothing of a request."""
        self.seen = [one for one in self.seen if one.plan is not plan]

    def forget_final(self, plan: Plan) -> None:
        """Keeps nothing of what was read by `final`: it comes again."""
        self.seen = [one for one in self.seen if one.plan is not plan or one.what != "final"]

    async def final(self, plan: Plan) -> Seen:
        """What a client that comes afterwards is told, from the first token on."""
        async with asyncio.timeout(FINAL_WAIT_S):
            seen = await self._read(plan, "final", self._second.resume(plan.request_id, 0))
        if plan.kind is Kind.CONFLICT:  # whichever body came first
            longest = replace(plan, max_tokens=plan.max_tokens + 1).expected(self._config)
            assert seen.tokens == longest[: len(seen.tokens)], f"{seen}: wrong tokens"
        else:
            seen.check(self._config)
        return seen

    async def _act(self, plan: Plan) -> list[Seen]:
        match plan.kind:
            case Kind.CANCEL:
                return await self._beside(plan, self._cancel(plan))
            case Kind.LEAVE:
                return [await self._left(plan)]
            case Kind.DROP:
                return [await self._dropped(plan)]
            case Kind.DROP_RESUME:
                first = await self._dropped(plan)
                return [first, await self._resumed(plan, len(first.tokens))]
            case Kind.RESUME:
                return await self._beside(plan, self._read_along(plan))
            case Kind.DUPLICATE:
                return await self._beside(plan, self._again(plan, plan.max_tokens))
            case Kind.CONFLICT:
                return await self._beside(plan, self._again(plan, plan.max_tokens + 1))
            case _:
                return [await self._plain(plan)]

    async def _plain(self, plan: Plan) -> Seen:
        return await self._read(plan, "generate", self._client.generate(**plan.options()))

    async def _beside(self, plan: Plan, other: Any) -> list[Seen]:
        first, second = await asyncio.gather(self._plain(plan), other)
        return [first, second] if second is not None else [first]

    async def _cancel(self, plan: Plan) -> None:
        await asyncio.sleep(plan.delay_s)
        try:
            await self._second.cancel(plan.request_id)
        except AutanError:
            return  # not known yet, or the store is away: the stream tells the rest

    async def _read_along(self, plan: Plan) -> Seen | None:
        await asyncio.sleep(plan.delay_s)
        mine = [one for one in self.seen if one.plan is plan]
        have = len(mine[0].tokens) if mine else 0
        return await self._resumed(plan, int(plan.share * (have + 1)))

    async def _resumed(self, plan: Plan, from_index: int) -> Seen:
        return await self._read(plan, "resume", self._second.resume(plan.request_id, from_index), from_index)

    async def _again(self, plan: Plan, max_tokens: int) -> Seen | None:
        await asyncio.sleep(plan.delay_s * plan.share)
        options = {**plan.options(), "max_tokens": max_tokens}
        seen = await self._read(plan, "again", self._second.generate(**options))
        return seen if max_tokens == plan.max_tokens else None

    async def _left(self, plan: Plan) -> Seen:
        task = asyncio.create_task(self._plain(plan))
        await asyncio.wait([task], timeout=plan.delay_s)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait([task])
        seen = next(one for one in self.seen if one.plan is plan)
        seen.left, seen.ended_s = True, time.monotonic()
        return seen

    async def _dropped(self, plan: Plan) -> Seen:
        """A Generate call of its own that ends after the delay, as a broken connection would end it."""
        seen = Seen(plan, "drop")
        self.seen.append(seen)
        values = plan.options()
        ids = inference.TokenIds(ids=values.pop("token_ids"))
        names = ("max_tokens", "temperature", "seed")
        sampling = inference.SamplingParams(**{name: values.pop(name) for name in names})
        channel = grpc.aio.insecure_channel(self._client.endpoint)
        try:
            stub = inference_pb2_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Generate(inference.GenerateRequest(token_ids=ids, sampling=sampling, **values))
            async with asyncio.timeout(plan.delay_s):
                async for event in call:
                    if event.WhichOneof("event") == "tokens":
                        assert event.tokens.first_index == len(seen.tokens), f"{seen}: a gap or a repetition"
                        seen.tokens += event.tokens.ids
        except (TimeoutError, grpc.aio.AioRpcError):
            pass
        finally:
            await channel.close()
        seen.left, seen.ended_s = True, time.monotonic()
        return seen

    async def _read(self, plan: Plan, what: str, events: AsyncIterator[Any], first_index: int = 0) -> Seen:
        seen = Seen(plan, what, first_index)
        self.seen.append(seen)
        try:
            async for event in events:
                match event:
                    case Accepted():
                        assert event.request_id == plan.request_id
                    case Delta():
                        assert event.first_index == first_index + len(seen.tokens), f"{seen}: a gap or a repetition"
                        seen.tokens += event.token_ids
                    case Finished():
                        seen.reason, seen.from_memory = event.reason, self._is_degraded()
                    case other:
                        raise AssertionError(f"{seen}: {other}")
        except AutanError as error:
            seen.error = error
        seen.ended_s = time.monotonic()
        return seen
