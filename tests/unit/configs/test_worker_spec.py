"""The worker spec travels as JSON and is as strict as the cluster file."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from configs.load import load_cluster
from configs.worker_spec import WorkerSpec


def spec(preset: str) -> WorkerSpec:
    cluster = load_cluster(preset)
    pool = cluster.pools[0]
    return WorkerSpec(
        cluster=cluster.name,
        instance_id=f"{pool.name}-0",
        pool=pool.name,
        role=pool.role,
        ranks=pool.ranks,
        model=cluster.model,
        model_dir="/models/x",
        engine=pool.engine,
        store_url="unix:///run/redis.sock",
        network=cluster.network,
        timing=cluster.timing,
        scheduling=cluster.scheduling,
    )


@pytest.mark.parametrize("preset", ["laptop", "oracle", "mistral-small-4-h100"])
def test_json_round_trip(preset: str) -> None:
    assert WorkerSpec.model_validate_json(spec(preset).model_dump_json()) == spec(preset)


@pytest.mark.parametrize(
    "change",
    [{"surprise": 1}, {"role": "router"}, {"store_url": "http://x"}, {"rank": "0"}, {"instance_id": "a:b"}, {"engine": {}}],
)
def test_wrong_specs_are_refused(change: dict[str, object]) -> None:
    text = json.dumps({**json.loads(spec("oracle").model_dump_json()), **change})
    with pytest.raises(ValidationError, match=next(iter(change))):
        WorkerSpec.model_validate_json(text)
