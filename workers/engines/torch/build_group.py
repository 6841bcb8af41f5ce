"""From the cluster file to one rank of a torch engine that several ranks share."""

from __future__ import annotations

from pathlib import Path

from configs.schema.pools import EngineConfig, ModelConfig
from workers.engine_api.group import GroupDoor, GroupPlace
from workers.engine_api.pool_memory import PoolMemory
from workers.engine_api.protocol import Engine
from workers.engines.torch.build import RunnerParts, engine_over, make_runner, read_parts, set_threads
from workers.engines.torch.distributed_ranks import DistributedRanks
from workers.engines.torch.follower import EngineFollower
from workers.engines.torch.group_runner import GroupHub, GroupRunner
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.kv_shares import row_share
from workers.engines.torch.load_progress import Progress, silent
from workers.engines.torch.rank_links import LinkDoor
from workers.engines.torch.ranks import RankOf


def create_head(
    model: ModelConfig,
    engine: EngineConfig,
    model_dir: Path,
    place: GroupPlace,
    progress: Progress = silent,
    memory: PoolMemory | None = None,
) -> tuple[Engine, GroupDoor]:
    """Rank 0's engine, which steps once its door has connected. Raises ModelError as create_engine does."""
    set_threads(engine)
    parts = read_parts(model, engine, model_dir)
    shares = [row_share(parts.config, parts.layout, RankOf(rank, place.ranks)) for rank in range(place.ranks)]
    ranks = _ranks(model, parts, place)
    inner = make_runner(parts, model, parts.load(ranks, progress), shares[0].layout(parts.layout), memory=memory)
    hub = GroupHub(LinkDoor(place.host, place.ranks, place.step_timeout_s, place.link_timeout_s), ranks, place.host)
    return engine_over(GroupRunner(inner, parts.layout, shares, hub), engine, model_dir), hub


def create_follower(
    model: ModelConfig, engine: EngineConfig, model_dir: Path, place: GroupPlace, progress: Progress = silent
) -> EngineFollower:
    """The share of a rank above 0, with as many KV blocks as rank 0 has. Raises ModelError."""
    set_threads(engine)
    parts = read_parts(model, engine, model_dir, place.rank)
    ranks = _ranks(model, parts, place)
    layout = row_share(parts.config, parts.layout, ranks).layout(parts.layout)
    decoder = parts.load(ranks, progress)
    cache = KvCache(layout, engine.num_blocks, parts.dtype, parts.device)
    return EngineFollower(decoder, parts.steps(), cache, ranks, parts.device, place.step_timeout_s)


def _ranks(model: ModelConfig, parts: RunnerParts, place: GroupPlace) -> DistributedRanks:
    return DistributedRanks(
        place.rank, place.ranks, place.host, parts.device, place.step_timeout_s, ordered=model.deterministic
    )  # fmt: skip
