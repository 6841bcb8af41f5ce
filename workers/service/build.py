"""The engine of a worker, by kind. Heavy libraries load with the kind that needs them."""

from __future__ import annotations

from pathlib import Path

from configs.schema.pools import EngineConfig, ModelConfig
from protos.contract.errors import ConfigError
from workers.engine_api.group import EngineShare, GroupDoor, GroupPlace
from workers.engine_api.pool_memory import PoolMemory
from workers.engine_api.protocol import Engine
from workers.service.loading import LoadWatch


def _unwatched(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def build_engine(
    model: ModelConfig,
    engine: EngineConfig,
    model_dir: Path | None,
    progress: LoadWatch = _unwatched,
    memory: PoolMemory | None = None,
    cache_dir: Path | None = None,
) -> Engine:
    """The engine of this model, its pool in `memory`; `progress` hears how far loading is, `cache_dir` is the folder of its
    disk cache.

    Raises ConfigError for a kind that is not here, ModelError for an unusable checkpoint.
    """
    if engine.kind == "oracle":
        from workers.engines.oracle import build as oracle

        return oracle.create_engine(model, engine, memory=memory, cache_dir=cache_dir)
    if engine.kind == "torch":
        from workers.engines.torch import build as torch_build

        return torch_build.create_engine(model, engine, _folder(model, model_dir), progress, memory, cache_dir)
    raise ConfigError(f"engine.kind: {engine.kind} is not available in this build; use oracle or torch")


def build_head(
    model: ModelConfig,
    engine: EngineConfig,
    model_dir: Path | None,
    place: GroupPlace,
    progress: LoadWatch = _unwatched,
    memory: PoolMemory | None = None,
    cache_dir: Path | None = None,
) -> tuple[Engine, GroupDoor | None]:
    """Rank 0's engine and where the other ranks connect, None when they have nothing to compute. Raises as build_engine."""
    if engine.kind != "torch" or place.ranks == 1:
        return build_engine(model, engine, model_dir, progress, memory, cache_dir), None
    from workers.engines.torch import build_group

    return build_group.create_head(model, engine, _folder(model, model_dir), place, progress, memory)


def build_share(
    model: ModelConfig, engine: EngineConfig, model_dir: Path | None, place: GroupPlace, progress: LoadWatch = _unwatched
) -> EngineShare | None:
    """The share of a rank above 0, None for an engine that rank 0 computes alone. Raises as build_engine."""
    if engine.kind != "torch":
        return None
    from workers.engines.torch import build_group

    return build_group.create_follower(model, engine, _folder(model, model_dir), place, progress)


def _folder(model: ModelConfig, model_dir: Path | None) -> Path:
    if model_dir is None:
        raise ConfigError(f"model.source: the torch engine needs the checkpoint folder of {model.name}")
    return model_dir
