"""The disk cache: what it needs, and whose folder is whose."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.schema.pools import DiskCacheConfig, EngineConfig, ModelConfig, PoolConfig
from protos.contract.errors import ConfigError
from workers.engines.oracle.build import create_engine

MODEL = ModelConfig(name="m", source="oracle")


def engine(**fields: object) -> EngineConfig:
    values = {"kind": "oracle", "block_tokens": 4, "host_cache_gb": 0.001, "disk_cache": DiskCacheConfig(gb=0.01)}
    return EngineConfig(**{**values, **fields})  # type: ignore[arg-type]


def test_each_refusal_names_its_key() -> None:
    for fields in ({"host_cache_gb": 0.0}, {"prefix_cache": False}):
        with pytest.raises(ValidationError) as caught:
            engine(**fields)
        assert caught.value.errors()[0]["loc"] == ("disk_cache",)
    with pytest.raises(ValidationError) as caught:
        DiskCacheConfig(gb=1, path="relative/folder")
    assert caught.value.errors()[0]["loc"] == ("path",)
    with pytest.raises(ValidationError) as caught:
        PoolConfig(name="p", role="combined", ranks=2, engine=engine())
    assert {error["loc"] for error in caught.value.errors()} == {("engine", "host_cache_gb"), ("engine", "disk_cache")}


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"host_cache_gb": 1e-6}, "engine.host_cache_gb"),
        ({"disk_cache": DiskCacheConfig(gb=1e-7)}, "engine.disk_cache.gb"),
        ({}, "engine.disk_cache.path"),
    ],
)
def test_a_cache_that_could_hold_nothing_is_refused(tmp_path: Path, fields: dict[str, object], key: str) -> None:
    folder = None if key.endswith("path") else tmp_path
    with pytest.raises(ConfigError, match=key):
        create_engine(MODEL, engine(**fields), cache_dir=folder)


def test_an_engine_takes_its_folder_and_gives_it_back(tmp_path: Path) -> None:
    for _ in range(2):
        made = create_engine(MODEL, engine(), cache_dir=tmp_path / "c" / "i")
        made.close()
    assert (tmp_path / "c" / "i").stat().st_mode & 0o777 == 0o700
