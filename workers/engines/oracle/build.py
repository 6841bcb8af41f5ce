"""Makes an oracle engine from the configuration."""

from __future__ import annotations

from pathlib import Path

from configs.model_card import card_of
from configs.schema.pools import EngineConfig, ModelConfig
from protos.contract.errors import ModelError
from workers.batching.engine_limits import EngineLimits
from workers.batching.paged_engine import PagedEngine
from workers.engine_api.clock import Clock
from workers.engine_api.pool_memory import PoolMemory
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.runner import OracleRunner
from workers.kv_tiers.build import disk_files


def oracle_model(model: ModelConfig) -> OracleModel:
    """The model that `create_engine` serves under this configuration.

    Raises ModelError when the file names another source, or a longer context than the oracle has.
    """
    if model.source != "oracle":
        raise ModelError(f"model {model.name}: the oracle engine serves source 'oracle' only, not {model.source!r}")
    return OracleModel(model.name, context_tokens=card_of(model, None).context_tokens)


def create_engine(
    model: ModelConfig,
    engine: EngineConfig,
    clock: Clock | None = None,
    memory: PoolMemory | None = None,
    cache_dir: Path | None = None,
) -> PagedEngine:
    """An engine ready to work; costs are charged to `clock`, the machine's if none is given. The pool is in `memory`.

    `cache_dir` is the folder of its disk cache. Raises ConfigError for one that could hold nothing.
    """
    runner = OracleRunner(
        oracle_model(model),
        num_blocks=engine.num_blocks,
        block_tokens=engine.block_tokens,
        prefill_tokens_per_s=engine.oracle.prefill_tokens_per_s,
        decode_step_s=engine.oracle.decode_step_s,
        clock=clock,
        memory=memory,
    )
    limits = EngineLimits(
        max_batch_tokens=engine.max_batch_tokens,
        max_running=engine.max_running,
        prefix_cache=engine.prefix_cache,
        host_cache_bytes=int(engine.host_cache_gb * 1e9),
    )
    files = disk_files(engine, cache_dir, runner.identity, runner.layout)
    return PagedEngine(runner, limits, files=files, clock=clock)
