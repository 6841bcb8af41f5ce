"""Engines whose pool lies in a sealed file keep the same contract, and what they export lies in that file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.schema.pools import EngineConfig, ModelConfig
from tests.contract.driver import EngineFactory, EngineShape
from tests.contract.engine_handoff_contract import HandOffContract
from tests.contract.engine_room_contract import RoomContract
from tests.contract.test_oracle_engine import MODEL, expected
from tests.support.torch_models import engine_config
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.engine_api.pool_memory import PoolMemory
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, Phase, SamplingParams
from workers.engines.oracle.build import create_engine as create_oracle
from workers.engines.oracle.runner import OracleRunner
from workers.engines.torch.build import create_engine as create_torch
from workers.engines.torch.tiny import write_tiny

__all__ = ["expected"]


@pytest.fixture
def make_engine() -> Iterator[EngineFactory]:
    memories: list[PoolMemory] = []

    def make(shape: EngineShape) -> PagedEngine:
        memories.append(PoolMemory(shared=True))
        runner = OracleRunner(MODEL, num_blocks=shape.num_blocks, block_tokens=shape.block_tokens, memory=memories[-1])
        limits = EngineLimits(
            max_batch_tokens=shape.max_batch_tokens, max_running=shape.max_running, prefix_cache=shape.prefix_cache
        )
        assert memories[-1].segment is not None
        return PagedEngine(runner, limits)

    yield make
    for memory in memories:
        memory.close()


class TestSharedOracleHandOff(HandOffContract):
    pass


class TestSharedOracleRoom(RoomContract):
    pass


def exported_offsets(engine: Engine, memory: PoolMemory) -> list[int | None]:
    """Where the layer groups of a prefilled sequence lie in the file, in order."""
    request = EngineRequest(
        request_id="r", epoch=1, prompt=tuple(range(3, 43)), sampling=SamplingParams(max_tokens=2), phase=Phase.PREFILL
    )
    engine.add(request)
    while engine.has_work():
        engine.step()
    segment = memory.segment
    assert segment is not None
    groups = range(engine.layout.num_groups)
    return [segment.offset_of(engine.export_kv(block, group)) for block in engine.pin("r", 1) for group in groups]


def test_what_the_engines_export_lies_in_the_file(tmp_path: Path) -> None:
    folder = write_tiny("mistral-small-4", tmp_path / "model", 3)
    for kind in ("oracle", "torch"):
        memory = PoolMemory(shared=True)
        if kind == "oracle":
            engine: Engine = create_oracle(
                ModelConfig(name="o", source="oracle"),
                EngineConfig(kind="oracle", num_blocks=32, block_tokens=16, max_batch_tokens=64),
                memory=memory,
            )
        else:
            engine = create_torch(
                ModelConfig(name="tiny", source=str(folder), dtype="float32"),
                engine_config(num_blocks=32, block_tokens=16),
                folder,
                memory=memory,
            )
        try:
            offsets = exported_offsets(engine, memory)
            assert None not in offsets and len(set(offsets)) == len(offsets) == 3 * engine.layout.num_groups
        finally:
            engine.close()
            memory.close()
