"""From the cluster file to the files of an instance."""

from __future__ import annotations

from pathlib import Path

from configs.schema.pools import EngineConfig
from protos.contract.errors import ConfigError
from workers.engine_api.types import KvLayout, ModelIdentity
from workers.kv_tiers.disk_files import DiskFiles, slot_bytes_of

MIN_HOST_BLOCKS = 4
"""Blocks of host memory below which nothing could be on its way to the disk while others are in use."""


def disk_files(engine: EngineConfig, folder: Path | None, identity: ModelIdentity, layout: KvLayout) -> DiskFiles | None:
    """The files of one instance, not opened yet; None when the cluster file asks for none.

    Raises ConfigError, naming the key, when they could hold nothing.
    """
    disk = engine.disk_cache
    if disk is None:
        return None
    if folder is None:
        raise ConfigError("engine.disk_cache.path: there is no run directory here; name a folder")
    host_blocks = int(engine.host_cache_gb * 1e9) // layout.block_bytes
    if host_blocks < MIN_HOST_BLOCKS:
        raise ConfigError(
            f"engine.host_cache_gb: {host_blocks} blocks of {layout.block_bytes} bytes fit, "
            f"a disk cache needs {MIN_HOST_BLOCKS} in front of it"
        )
    files = DiskFiles(folder, int(disk.gb * 1e9), identity, layout)
    if files.num_slots < 1:
        raise ConfigError(f"engine.disk_cache.gb: not one block of {slot_bytes_of(layout)} bytes fits in {disk.gb:g} GB")
    return files
