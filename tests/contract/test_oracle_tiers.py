"""The oracle engine keeps the contract with host memory and a disk below its pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests.contract.driver import EngineFactory, EngineShape, Expected
from tests.contract.engine_contract import EngineContract
from tests.contract.engine_handoff_contract import HandOffContract
from tests.contract.engine_move_contract import MoveContract
from tests.contract.engine_prefix_contract import PrefixContract
from tests.contract.engine_recall_contract import LOWER_DISK_BLOCKS, LOWER_HOST_BLOCKS, SIZE, RecallContract, TieredFactory
from tests.support.tier_world import HandLanes, InlineLanes, tiered
from workers.batching.engine_limits import EngineLimits
from workers.batching.paged_engine import PagedEngine
from workers.engine_api.clock import ManualClock, SystemClock
from workers.engine_api.types import SamplingParams
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.reference import expected_tokens
from workers.engines.oracle.runner import OracleRunner

MODEL = OracleModel("contract", context_tokens=512)
HOST_BLOCKS, DISK_BLOCKS = 3, 5


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[EngineFactory]:
    numbers = count()
    with ExitStack() as stack:

        def make(shape: EngineShape) -> PagedEngine:
            engine = tiered_engine(shape, tmp_path / str(next(numbers)))
            stack.callback(engine.close)
            return engine

        yield make


def tiered_engine(shape: EngineShape, folder: Path) -> PagedEngine:
    if not shape.prefix_cache:
        runner = OracleRunner(MODEL, num_blocks=shape.num_blocks, block_tokens=shape.block_tokens)
        limits = EngineLimits(
            max_batch_tokens=shape.max_batch_tokens, max_running=shape.max_running, prefix_cache=False, host_cache_bytes=10**6
        )
        return PagedEngine(runner, limits)
    return tiered(
        MODEL,
        num_blocks=shape.num_blocks,
        block_tokens=shape.block_tokens,
        host_blocks=HOST_BLOCKS,
        folder=folder,
        disk_blocks=DISK_BLOCKS,
        lanes=InlineLanes(),
        clock=SystemClock(),
        max_batch_tokens=shape.max_batch_tokens,
        max_running=shape.max_running,
    )


@pytest.fixture
def expected() -> Expected:
    def tokens(prompt: tuple[int, ...], sampling: SamplingParams) -> list[int]:
        return expected_tokens(MODEL, prompt, sampling)

    return tokens


@pytest.fixture
def make_tiered() -> Iterator[TieredFactory]:
    with ExitStack() as stack:

        def make(folder: Path, lanes: HandLanes, clock: ManualClock, num_blocks: int) -> PagedEngine:
            engine = tiered(
                MODEL,
                num_blocks=num_blocks,
                block_tokens=SIZE,
                host_blocks=LOWER_HOST_BLOCKS,
                folder=folder,
                disk_blocks=LOWER_DISK_BLOCKS,
                lanes=lanes,
                clock=clock,
            )
            stack.callback(engine.close)
            return engine

        yield make


class TestTieredEngine(EngineContract):
    pass


class TestTieredHandOff(HandOffContract):
    pass


class TestTieredPrefix(PrefixContract):
    pass


class TestTieredMoves(MoveContract):
    pass


class TestTieredRecall(RecallContract):
    pass
