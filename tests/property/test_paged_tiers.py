"""One engine over tiny tiers under random calls, late io, damaged files and restarts: no wrong token, no wrong book.

The oracle folds every row that it reads into its tokens, so one wrong byte in one block changes what comes next.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from protos.contract.block_hash import block_hashes, root_hash
from tests.support.tier_world import HandLanes, tiered
from workers.batching.engine_limits import EngineLimits
from workers.batching.io_lanes import Lane
from workers.batching.paged_engine import PagedEngine
from workers.engine_api.block_files import StoredBlock
from workers.engine_api.clock import ManualClock
from workers.engine_api.types import EngineRequest, PrefixTicket, SamplingParams
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.reference import expected_tokens
from workers.engines.oracle.runner import OracleRunner
from workers.kv_tiers.slot_format import HEADER_BYTES

MODEL = OracleModel("tiered", num_layers=2, context_tokens=64)
BLOCK_TOKENS = 4
BLOCK_BYTES = MODEL.layout(BLOCK_TOKENS).block_bytes
IDS = [f"r{n}" for n in range(5)]
BASES = tuple(tuple(range(first, first + 40)) for first in (10, 60, 110))


@lru_cache(maxsize=4096)
def right_output(prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
    return tuple(expected_tokens(MODEL, prompt, sampling))


WARM = tuple(base[:length] for base in BASES for length in (13, 21, 29))


@lru_cache(maxsize=4096)
def right_block(tokens: tuple[int, ...], index: int, group: int) -> bytes:
    """The bytes of a full block of these tokens, by an engine that has nothing but a pool."""
    size = (index + 1) * BLOCK_TOKENS
    engine = PagedEngine(
        OracleRunner(MODEL, num_blocks=16, block_tokens=BLOCK_TOKENS), EngineLimits(max_batch_tokens=64, max_running=1)
    )
    engine.add(EngineRequest(request_id="r", epoch=1, prompt=tokens[:size], sampling=SamplingParams(max_tokens=1)))
    while engine.has_work():
        engine.step()
    names = block_hashes(root_hash(MODEL.identity.weights_digest, b""), tokens[:size], BLOCK_TOKENS)
    ticket = engine.export_prefix(names)
    return bytes(engine.export_kv(ticket.block_ids[index], group))


prompts = st.builds(
    lambda base, shared, own: base[:shared] + own,
    st.sampled_from(BASES),
    st.integers(0, 26),
    st.lists(st.sampled_from([5, 6]), min_size=1, max_size=5).map(tuple),
)
samplings = st.builds(SamplingParams, max_tokens=st.integers(1, 6))


class TieredEngine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="autan-tiers-"))
        self.clock = ManualClock()
        self.epoch = 0
        self.live: dict[str, EngineRequest] = {}
        self.received: dict[str, int] = {}
        self.lent: list[int] = []
        self.answered: list[tuple[tuple[int, ...], PrefixTicket]] = []
        self.waiting_recalls: set[int] = set()
        self.while_reading: Callable[[], None] = lambda: None

    @initialize(
        blocks=st.integers(9, 16),
        host=st.integers(1, 8),
        disk=st.integers(0, 12),
        budget=st.sampled_from([3, 8, 32]),
        running=st.integers(1, 3),
    )
    def start(self, blocks: int, host: int, disk: int, budget: int, running: int) -> None:
        self.shape = {"num_blocks": blocks, "host_blocks": host, "max_batch_tokens": budget, "max_running": running}
        self.disk = disk
        self._boot()

    def _boot(self) -> None:
        self.lanes = HandLanes()
        self.engine = tiered(
            MODEL,
            block_tokens=BLOCK_TOKENS,
            folder=self.folder if self.disk else None,
            disk_blocks=self.disk,
            lanes=self.lanes,
            clock=self.clock,
            **self.shape,
        )
        self.told: set[bytes] = set()
        tiers = self.engine._tiers
        if tiers is not None and tiers.disk is not None:
            read = tiers.disk.files.read

            def watched(slot: int, block: StoredBlock, into: memoryview) -> bool:
                right = read(slot, block, into)
                self.while_reading()
                return right

            tiers.disk.files.read = watched  # type: ignore[method-assign]

    @rule(prompt_ids=st.lists(st.integers(0, len(WARM) - 1), min_size=1, max_size=6))
    def serve(self, prompt_ids: list[int]) -> None:
        """Whole prompts with prompt io: what fills the tiers."""
        for index in prompt_ids:
            self.add(IDS[0], WARM[index], SamplingParams(max_tokens=1), b"")
            for _ in range(40):
                self._all_io()
                if IDS[0] not in self.live or not self._step():
                    break

    def _all_io(self) -> None:
        while sum(self.lanes.run(lane) for lane in Lane):
            self.engine.has_work()

    @rule(request_id=st.sampled_from(IDS), steps=st.integers(0, 3), prompt=prompts)
    def abort_while_a_block_is_read(self, request_id: str, steps: int, prompt: tuple[int, ...]) -> None:
        """What was reserved for it has another owner before the reading thread goes on."""

        def now() -> None:
            self.while_reading = lambda: None
            self.abort(request_id)
            self.add(request_id, prompt, SamplingParams(max_tokens=2), b"x")
            self.step(steps)

        self.while_reading = now
        self.lanes.run(Lane.FETCH, 1)
        self.while_reading = lambda: None

    @rule(request_id=st.sampled_from(IDS), prompt=prompts, sampling=samplings, salt=st.sampled_from([b"", b"", b"x"]))
    def add(self, request_id: str, prompt: tuple[int, ...], sampling: SamplingParams, salt: bytes) -> None:
        self.epoch += 1
        request = EngineRequest(request_id=request_id, epoch=self.epoch, prompt=prompt, sampling=sampling, cache_salt=salt)
        self.engine.add(request)
        self.live[request_id], self.received[request_id] = request, 0

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _step(self) -> bool:
        had_work = self.engine.has_work()
        result = self.engine.step()
        assert not result.failed
        for token in result.tokens:
            request = self.live[token.request_id]
            right = right_output(request.prompt, request.sampling)
            assert (token.epoch, token.index) == (request.epoch, self.received[token.request_id])
            assert token.token_id == right[token.index], "a wrong block was read"
            self.received[token.request_id] += 1
            if token.finish is not None:
                del self.live[token.request_id]
        return had_work

    @rule(request_id=st.sampled_from(IDS))
    def abort(self, request_id: str) -> None:
        assert self.engine.abort(request_id, self.epoch) == (request_id in self.live)
        self.live.pop(request_id, None)

    @rule(lane=st.sampled_from(Lane), jobs=st.integers(1, 5))
    def io(self, lane: Lane, jobs: int) -> None:
        self.lanes.run(lane, jobs)

    @rule(seconds=st.sampled_from([0.1, 1.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.wait_s(seconds)

    @rule(seed=st.integers(0, 10**6), how=st.sampled_from(["flip", "every payload", "truncate", "swap"]))
    def damage(self, seed: int, how: str) -> None:
        rng = random.Random(seed)
        for path in sorted(self.folder.glob("segment-*.kv")):
            data = bytearray(path.read_bytes())
            if how == "truncate":
                with path.open("r+b") as file:
                    file.truncate(rng.randrange(len(data) + 1))
            elif data:
                at, other = rng.randrange(0, len(data), 4096), rng.randrange(0, len(data), 4096)
                if how == "every payload":
                    for slot in range(0, len(data) - 4095, 4096):
                        data[slot + HEADER_BYTES + rng.randrange(MODEL.layout(BLOCK_TOKENS).block_bytes)] ^= 1 << rng.randrange(
                            8
                        )
                elif how == "swap":
                    data[at : at + 4096], data[other : other + 4096] = data[other : other + 4096], data[at : at + 4096]
                else:
                    data[at + rng.randrange(min(600, len(data) - at))] ^= 1 << rng.randrange(8)
                with path.open("r+b") as file:
                    file.write(data)

    @rule(base=st.sampled_from(BASES), count=st.integers(1, 6))
    def lend(self, base: tuple[int, ...], count: int) -> None:
        names = block_hashes(root_hash(self.engine.identity.weights_digest, b""), base, BLOCK_TOKENS)
        ticket = self.engine.export_prefix(names[:count])
        self.lent.append(ticket.ticket_id)
        if len(self.lent) > 1:
            assert self.engine.export_prefix_end(self.lent.pop(0))

    @rule(base=st.sampled_from(BASES), count=st.integers(1, 8), wait_s=st.sampled_from([0.0, 1.0, 60.0]))
    def recall(self, base: tuple[int, ...], count: int, wait_s: float) -> None:
        """A peer asks for what may be in any tier; what it gets is what the oracle computes for these tokens."""
        names = block_hashes(root_hash(self.engine.identity.weights_digest, b""), base, BLOCK_TOKENS)[:count]

        def lent(ticket: PrefixTicket) -> None:
            self.waiting_recalls.discard(ticket.ticket_id)
            self.answered.append((base, ticket))

        ticket_id = self.engine.recall_prefix(names, wait_s, lent)
        if ticket_id not in [ticket.ticket_id for _, ticket in self.answered]:
            self.waiting_recalls.add(ticket_id)
        self._check_answers()

    @rule()
    def forget_recalls(self) -> None:
        for ticket_id in list(self.waiting_recalls):
            if ticket_id in self.waiting_recalls:
                assert self.engine.export_prefix_end(ticket_id)
                self.waiting_recalls.discard(ticket_id)

    def _check_answers(self) -> None:
        while self.answered:
            base, ticket = self.answered.pop()
            for index, block_id in enumerate(ticket.block_ids):
                for group in range(self.engine.layout.num_groups):
                    assert bytes(self.engine.export_kv(block_id, group)) == right_block(base, index, group), (
                        "a wrong block is lent"
                    )
            assert self.engine.export_prefix_end(ticket.ticket_id)

    @rule()
    def restart(self) -> None:
        self.engine.close()
        self.live.clear()
        self.lent.clear()
        self.waiting_recalls.clear()
        self._boot()

    @invariant()
    def books_are_in_order(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_integrity()
        self._check_answers()
        for event in self.engine.drain_cache_events():
            assert not self.told & set(event.stored)
            assert self.told >= set(event.removed)
            self.told = (self.told | set(event.stored)) - set(event.removed)
        assert self.told == self.engine.known_names()
        stats = self.engine.stats()
        assert (stats.leaked_blocks, stats.known_names) == (0, len(self.told))
        assert stats.waiting + stats.running == len(self.live)
        assert stats.host_blocks <= self.shape["host_blocks"]
        assert stats.disk_blocks <= self.disk

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            for ticket_id in self.lent:
                assert self.engine.export_prefix_end(ticket_id)
            for _ in range(3000):
                if not self._step() and not sum(self.lanes.run(lane) for lane in Lane):
                    if not self.live and not self.waiting_recalls:
                        break
                    self.clock.wait_s(11.0)  # beyond every deadline
            assert not self.live, "what waits for a block that never comes is computed"
            self.engine.check_integrity()
            assert not self.waiting_recalls, "a recall ends by itself"
            self._check_answers()
            stats = self.engine.stats()
            assert (stats.used_blocks, stats.leaked_blocks, stats.waiting, stats.restoring) == (0, 0, 0, 0)
            self.engine.close()
        shutil.rmtree(self.folder, ignore_errors=True)


TieredEngine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTieredEngine = TieredEngine.TestCase
