"""Two engines under random calls: books always in order, every token right, everything finishes, nothing is left."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protos.contract.errors import OutOfBlocks, StaleEpoch
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.engine_api.types import EngineRequest, ImportTicket, Phase, SamplingParams, StepResult
from workers.engines.oracle.model import ALPHABET, OracleModel
from workers.engines.oracle.reference import expected_tokens
from workers.engines.oracle.runner import OracleRunner

MODEL = OracleModel("stateful", num_layers=2, context_tokens=64)
BLOCK_TOKENS = 4
IDS = [f"r{n}" for n in range(6)]
BASE = tuple(range(10, 60))  # prompts share prefixes of it


@lru_cache(maxsize=4096)
def right_output(prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
    return tuple(expected_tokens(MODEL, prompt, sampling))


prompts = st.builds(
    lambda shared, own: BASE[:shared] + own,
    st.integers(0, 20),
    st.lists(st.sampled_from([5, 6]), min_size=1, max_size=6).map(tuple),
)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 1),
    stop_token_ids=st.sampled_from([frozenset[int](), frozenset(ALPHABET[:5])]),
)
requests = st.builds(
    EngineRequest,
    request_id=st.sampled_from(IDS),
    epoch=st.just(0),
    prompt=prompts,
    sampling=samplings,
    phase=st.sampled_from(Phase),
    cache_salt=st.sampled_from([b"", b"other"]),
)
sides = st.integers(0, 1)
picks = st.integers(0, 10**6)


@dataclass
class Transfer:
    """An open import, with the bytes it should get."""

    ticket: ImportTicket
    frames: list[tuple[int, int, bytes]]
    next_token: int


@dataclass
class Side:
    """One engine and what the test knows of it."""

    engine: PagedEngine
    live: dict[str, EngineRequest] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)  # next output index
    held: dict[str, int] = field(default_factory=dict)  # sampled token
    imports: dict[str, Transfer] = field(default_factory=dict)
    pins: set[tuple[str, int]] = field(default_factory=set)

    def forget(self, request_id: str) -> None:
        for known in (self.live, self.received, self.held, self.imports):
            known.pop(request_id, None)

    def step(self) -> bool:
        """Steps once and checks all that is reported; False when there was nothing to run."""
        had_work = self.engine.has_work()
        result = self.engine.step()
        assert had_work == (result != StepResult())
        assert not result.failed
        for token in result.tokens:
            request = self.live[token.request_id]
            right = right_output(request.prompt, request.sampling)
            assert (token.epoch, token.index) == (request.epoch, self.received[token.request_id])
            assert token.token_id == right[token.index]
            assert (token.finish is not None) == (token.index == len(right) - 1)
            self.received[token.request_id] += 1
            if request.phase is Phase.PREFILL:
                self.held[token.request_id] = token.token_id
            elif token.finish is not None:
                self.forget(token.request_id)
        return had_work


class TwoEngines(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sides: list[Side] = []
        self.epoch = 0

    @initialize(
        blocks=st.lists(st.integers(12, 24), min_size=2, max_size=2),
        budget=st.sampled_from([1, 3, 8, 64]),
        max_running=st.integers(1, 4),
        cache=st.booleans(),
    )
    def start(self, blocks: list[int], budget: int, max_running: int, cache: bool) -> None:
        limits = EngineLimits(max_batch_tokens=budget, max_running=max_running, prefix_cache=cache)
        for num_blocks in blocks:
            runner = OracleRunner(MODEL, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS)
            self.sides.append(Side(PagedEngine(runner, limits)))

    @rule(side=sides, drawn=requests, known=st.integers(0, 5))
    def add(self, side: int, drawn: EngineRequest, known: int) -> None:
        self.epoch += 1
        at, request_id = self.sides[side], drawn.request_id
        output = right_output(drawn.prompt, drawn.sampling)
        output = output[: min(known, len(output) - 1)]
        request = replace(drawn, epoch=self.epoch, output=output)
        at.engine.add(request)
        at.forget(request_id)
        at.live[request_id] = request
        at.received[request_id] = len(output)

    @rule(side=sides, steps=st.integers(1, 6))
    def step(self, side: int, steps: int) -> None:
        for _ in range(steps):
            self.sides[side].step()

    @rule(side=sides, request_id=st.sampled_from(IDS), age=st.integers(-1, 1))
    def abort(self, side: int, request_id: str, age: int) -> None:
        at = self.sides[side]
        known = at.live.get(request_id)
        done = at.engine.abort(request_id, known.epoch + age if known else self.epoch)
        assert done == (known is not None and age >= 0)
        if done:
            at.forget(request_id)

    @rule(side=sides, request_id=st.sampled_from(IDS))
    def release(self, side: int, request_id: str) -> None:
        at = self.sides[side]
        known = at.live.get(request_id)
        assert at.engine.release(request_id, known.epoch if known else self.epoch) == (request_id in at.held)
        if request_id in at.held:
            at.forget(request_id)

    @rule(side=sides, request_id=st.sampled_from(IDS))
    def pin(self, side: int, request_id: str) -> None:
        at = self.sides[side]
        known = at.live.get(request_id)
        if known is None:
            try:
                at.engine.pin(request_id, self.epoch)
            except StaleEpoch:
                return
            raise AssertionError("pinned something that is not here")
        assert len(set(at.engine.pin(request_id, known.epoch))) <= at.engine.stats().used_blocks
        at.pins.add((request_id, known.epoch))

    @precondition(lambda self: any(side.pins for side in self.sides))
    @rule(side=sides, pick=picks)
    def unpin(self, side: int, pick: int) -> None:
        at = self.sides[side]
        if at.pins:
            key = sorted(at.pins)[pick % len(at.pins)]
            at.engine.unpin(*key)
            at.engine.unpin(*key)
            at.pins.remove(key)

    @precondition(lambda self: any(side.held for side in self.sides))
    @rule(side=sides, pick=picks)
    def import_begin(self, side: int, pick: int) -> None:
        source, target = self.sides[side], self.sides[1 - side]
        if not source.held:
            return
        request_id = sorted(source.held)[pick % len(source.held)]
        request = source.live[request_id]
        rows = len(request.prompt) + len(request.output)
        known = target.live.get(request_id)
        ends = source.received[request_id] == len(right_output(request.prompt, request.sampling))
        if ends:
            return
        try:
            ticket = target.engine.import_begin(request, rows)
        except StaleEpoch:
            assert known is not None
            assert known.epoch >= request.epoch
            return
        except OutOfBlocks:
            target.forget(request_id)
            return
        target.forget(request_id)
        blocks = source.engine.pin(request_id, request.epoch)
        frames = [
            (ticket.block_ids[index], group, bytes(source.engine.export_kv(blocks[index], group)))
            for index in range(ticket.reused_blocks, len(blocks))
            for group in range(source.engine.layout.num_groups)
        ]
        if (request_id, request.epoch) not in source.pins:
            source.engine.unpin(request_id, request.epoch)
        target.live[request_id] = replace(request, phase=Phase.FULL)
        target.received[request_id] = source.received[request_id]
        target.imports[request_id] = Transfer(ticket, frames, source.held[request_id])

    @precondition(lambda self: any(side.imports for side in self.sides))
    @rule(side=sides, pick=picks, frames=st.integers(1, 3))
    def import_write(self, side: int, pick: int, frames: int) -> None:
        at = self.sides[side]
        if at.imports:
            transfer = at.imports[sorted(at.imports)[pick % len(at.imports)]]
            for _ in range(min(frames, len(transfer.frames))):
                self._write(at, transfer)

    @precondition(lambda self: any(side.imports for side in self.sides))
    @rule(side=sides, pick=picks, commit=st.booleans())
    def import_end(self, side: int, pick: int, commit: bool) -> None:
        at = self.sides[side]
        if not at.imports:
            return
        request_id = sorted(at.imports)[pick % len(at.imports)]
        transfer, epoch = at.imports[request_id], at.live[request_id].epoch
        if commit:
            while transfer.frames:
                self._write(at, transfer)
            at.engine.import_commit(request_id, epoch, (transfer.next_token,))
            del at.imports[request_id]
        else:
            assert at.engine.import_abort(request_id, epoch)
            at.forget(request_id)

    def _write(self, at: Side, transfer: Transfer) -> None:
        block_id, group, data = transfer.frames.pop()
        half = len(data) // 2
        at.engine.import_kv(block_id, group, half, memoryview(data)[half:])
        at.engine.import_kv(block_id, group, 0, memoryview(data)[:half])

    @invariant()
    def books_are_in_order(self) -> None:
        for at in self.sides:
            at.engine.check_integrity()
            stats = at.engine.stats()
            assert stats.leaked_blocks == 0
            assert (stats.holding, stats.importing) == (len(at.held), len(at.imports))
            assert stats.waiting + stats.running == len(at.live) - len(at.held) - len(at.imports)

    def teardown(self) -> None:
        for at in self.sides:
            for request_id in [*at.held, *at.imports]:
                assert at.engine.abort(request_id, self.epoch)
                at.forget(request_id)
            for key in at.pins:
                at.engine.unpin(*key)
            for _ in range(2000):
                if not at.step():
                    break
                for request_id in list(at.held):
                    assert at.engine.release(request_id, at.live[request_id].epoch)
                    at.forget(request_id)
            assert not at.live, "what runs finishes once nothing outside of the batch holds blocks"
            at.engine.check_integrity()
            stats = at.engine.stats()
            assert (stats.used_blocks, stats.leaked_blocks, stats.waiting, stats.running) == (0, 0, 0, 0)


TwoEngines.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTwoEngines = TwoEngines.TestCase
