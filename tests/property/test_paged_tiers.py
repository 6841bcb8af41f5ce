"""One engine over tiny tiers under random calls, late io, damaged files and restarts: no wrong token, no wrong book.

The oracle folds every row that it reads into its tokens, so one wrong byte in one block changes what comes next.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from protos.contract.block_hash import block_hashes, root_hash
from tests.support.tier_world import HandLanes, tiered
from workers.batching.io_lanes import Lane
from workers.engine_api.clock import ManualClock
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.reference import expected_tokens

MODEL = OracleModel("tiered", num_layers=2, context_tokens=64)
BLOCK_TOKENS = 4
IDS = [f"r{n}" for n in range(5)]
BASES = tuple(tuple(range(first, first + 40)) for first in (10, 60, 110))


@lru_cache(maxsize=4096)
def right_output(prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
    return tuple(expected_tokens(MODEL, prompt, sampling))


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

    @rule(seed=st.integers(0, 10**6), how=st.sampled_from(["flip", "flip", "truncate", "swap"]))
    def damage(self, seed: int, how: str) -> None:
        rng = random.Random(seed)
        for path in sorted(self.folder.glob("segment-*.kv")):
            data = bytearray(path.read_bytes())
            if how == "truncate":
                with path.open("r+b") as file:
                    file.truncate(rng.randrange(len(data) + 1))
            elif data:
                at, other = rng.randrange(0, len(data), 4096), rng.randrange(0, len(data), 4096)
                if how == "swap":
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

    @rule()
    def restart(self) -> None:
        self.engine.close()
        self.live.clear()
        self.lent.clear()
        self._boot()

    @invariant()
    def books_are_in_order(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_integrity()
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
                    if not self.live:
                        break
                    self.clock.wait_s(11.0)  # beyond every deadline
            assert not self.live, "what waits for a block that never comes is computed"
            self.engine.check_integrity()
            stats = self.engine.stats()
            assert (stats.used_blocks, stats.leaked_blocks, stats.waiting, stats.restoring) == (0, 0, 0, 0)
            self.engine.close()
        shutil.rmtree(self.folder, ignore_errors=True)


TieredEngine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTieredEngine = TieredEngine.TestCase
