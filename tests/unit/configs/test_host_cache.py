"""The host cache belongs to instances of one rank."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from configs.schema.pools import EngineConfig, PoolConfig


def test_a_host_cache_of_several_ranks_is_refused_by_its_key() -> None:
    engine = EngineConfig(kind="torch", host_cache_gb=0.5)
    assert PoolConfig(name="p", role="combined", engine=engine).engine.host_cache_gb == 0.5
    with pytest.raises(ValidationError) as caught:
        PoolConfig(name="p", role="combined", ranks=2, engine=engine)
    assert caught.value.errors()[0]["loc"] == ("engine", "host_cache_gb")
