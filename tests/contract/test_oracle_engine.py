"""The oracle engine keeps the contract, and any damage to its blocks shows in its tokens."""

from __future__ import annotations

import pytest

from tests.contract.driver import EngineFactory, EngineShape, Expected
from tests.contract.engine_contract import EngineContract
from tests.contract.engine_handoff_contract import HandOffContract
from tests.contract.engine_move_contract import MoveContract
from tests.contract.engine_prefix_contract import PrefixContract
from tests.contract.engine_room_contract import RoomContract
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.engine_api.types import SamplingParams
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.reference import expected_tokens
from workers.engines.oracle.runner import OracleRunner

MODEL = OracleModel("contract", context_tokens=512)


def make_oracle(shape: EngineShape) -> PagedEngine:
    runner = OracleRunner(MODEL, num_blocks=shape.num_blocks, block_tokens=shape.block_tokens)
    limits = EngineLimits(
        max_batch_tokens=shape.max_batch_tokens, max_running=shape.max_running, prefix_cache=shape.prefix_cache
    )
    return PagedEngine(runner, limits)


@pytest.fixture
def make_engine() -> EngineFactory:
    return make_oracle


@pytest.fixture
def expected() -> Expected:
    def tokens(prompt: tuple[int, ...], sampling: SamplingParams) -> list[int]:
        return expected_tokens(MODEL, prompt, sampling)

    return tokens


class TestOracleEngine(EngineContract):
    pass


class TestOracleHandOff(HandOffContract):
    pass


class TestOracleRoom(RoomContract):
    pass


class TestOraclePrefix(PrefixContract):
    pass


class TestOracleMoves(MoveContract):
    pass
