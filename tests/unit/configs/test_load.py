"""Right files: presets, defaults, and any config written out and read again."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.load import dump_effective, load_bytes, load_cluster, preset_names, preset_path
from configs.schema.cluster import ClusterConfig, LauncherConfig, SchedulingConfig, StoreConfig, TimingConfig
from configs.schema.network import IngressConfig, NetworkConfig
from configs.schema.pools import EngineConfig, ModelConfig, PoolConfig
from protos.contract.errors import ConfigError

NAMES = st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=64)
SECONDS = st.floats(1e-3, 86_400)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")), min_size=1, max_size=40)
TRICKY = st.sampled_from(
    ["on", "null", "~", "1e9", "0o17", "007", ".5", "2026-01-01", "1:30", "=", "<<", "a: b", "# x", " lead"]
)


def engines(kind: str, block_tokens: int) -> st.SearchStrategy[EngineConfig]:
    return st.builds(
        EngineConfig,
        kind=st.just(kind),
        device=st.sampled_from(["cpu", "cuda"]),
        threads=st.none() | st.integers(1, 1024),
        block_tokens=st.just(block_tokens),
        num_blocks=st.integers(2, 16_777_216),
        prefix_cache=st.booleans(),
    )


@st.composite
def clusters(draw: Any) -> ClusterConfig:
    kind, source = draw(st.sampled_from([("oracle", "oracle"), ("torch", "demo"), ("vllm", "/models/x")]))
    if source == "demo":
        source = draw((TEXT | TRICKY).filter(lambda text: text != "oracle"))
    block_tokens = draw(st.integers(1, 1024))
    names = draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    roles = ["prefill", "decode", *[draw(st.sampled_from(["prefill", "decode", "combined"])) for _ in names[2:]]]
    pools = [
        PoolConfig(
            name=name,
            role=role,
            instances=draw(st.integers(1, 4096)),
            gpus_per_rank=draw(st.floats(0, 64)),
            resources=draw(st.dictionaries(NAMES, st.floats(1e-6, 1e9), max_size=2)),
            engine=draw(engines(kind, block_tokens)),
        )
        for name, role in zip(names, roles, strict=True)
    ]
    heartbeat_s = draw(st.floats(1e-3, 100))
    return ClusterConfig(
        name=draw(NAMES),
        model=ModelConfig(name=draw(NAMES), source=source, context_tokens=draw(st.none() | st.integers(16, 1_048_576))),
        pools=pools,
        store=draw(st.builds(StoreConfig, url=st.sampled_from([None, "redis://h:1/0", "unix:///x"]), timeout_s=SECONDS)),
        launcher=draw(st.builds(LauncherConfig, kind=st.sampled_from(["ray", "subprocess"]), address=st.none())),
        network=draw(st.builds(NetworkConfig, bind=st.sampled_from(["loopback", "node"]), insecure=st.booleans())),
        ingress=draw(st.builds(IngressConfig, address=st.sampled_from(["127.0.0.1:0", "unix:///run/a b.sock", "[::1]:80"]))),
        timing=TimingConfig(heartbeat_s=heartbeat_s, lease_s=heartbeat_s * 4, drain_s=draw(SECONDS)),
        scheduling=draw(st.builds(SchedulingConfig, max_queued=st.integers(1, 1_000_000))),
    )


@given(clusters())
@settings(max_examples=60, deadline=None)
def test_what_is_written_out_reads_back_equal(config: ClusterConfig) -> None:
    assert load_bytes(dump_effective(config).encode(), "F") == config


@pytest.mark.parametrize("line_break", ["\n", "\x85", "\u2028", "\0"])
def test_a_path_is_one_line(line_break: str) -> None:
    with pytest.raises(ValidationError):
        ModelConfig(name="m", source=f"/models/a{line_break}b")


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_right_and_survive_a_round_trip(name: str) -> None:
    config = load_cluster(name)
    assert load_bytes(dump_effective(config).encode(), "F") == config
    assert load_cluster(preset_path(name)) == config


def test_the_promised_presets_exist() -> None:
    family = {f"mistral-small-4-{gpu}" for gpu in ("h100", "h200", "b200")}
    assert {"laptop", "oracle", "compose"} | family == set(preset_names())
    with pytest.raises(ConfigError, match=r"oracel: no such preset \(did you mean oracle\?\)"):
        preset_path("oracel")


def test_the_laptop_stays_on_this_machine_and_fits_it() -> None:
    config = load_cluster("laptop")
    assert config.store.url is None
    assert config.network.bind == "loopback"
    assert config.ingress.address.startswith("127.0.0.1:")
    assert config.model.dtype == "float32"
    assert [(pool.role, pool.instances, pool.engine.threads) for pool in config.pools] == [("prefill", 1, 1), ("decode", 1, 1)]


def test_the_oracle_preset_holds_two_hundred_long_requests_on_each_side() -> None:
    for pool in load_cluster("oracle").pools:
        blocks_per_request = -(-2100 // pool.engine.block_tokens)
        assert pool.engine.num_blocks >= 200 * blocks_per_request


@pytest.mark.parametrize("gpu", ["h100", "h200", "b200"])
def test_mistral_small_4_fits_its_gpus(gpu: str) -> None:
    config = load_cluster(f"mistral-small-4-{gpu}")
    gpu_bytes = {"h100": 80e9, "h200": 141e9, "b200": 180e9}[gpu]
    gpus = {"h100": 32, "h200": 32, "b200": 16}[gpu]
    assert config.model.context_tokens == 262_144
    assert sum(pool.instances * pool.ranks * pool.gpus_per_rank for pool in config.pools) == gpus
    for pool in config.pools:
        kv_bytes = pool.engine.num_blocks * pool.engine.block_tokens * 23_040
        assert pool.engine.num_blocks * pool.engine.block_tokens >= 262_144
        assert 120.9e9 / pool.ranks + kv_bytes < 0.9 * gpu_bytes


def test_scalars_are_those_of_yaml_1_2() -> None:
    text = (
        "version: 1\nname: on\nmodel: {name: 2026-01-01, source: yes}\n"
        "pools: [{name: p, role: combined, engine: {kind: torch, num_blocks: 0x10, oracle: {prefill_tokens_per_s: 1e3}}}]\n"
    )
    config = load_bytes(text.encode(), "F")
    assert (config.name, config.model.name, config.model.source) == ("on", "2026-01-01", "yes")
    assert config.pools[0].engine.num_blocks == 16
    assert config.pools[0].engine.oracle.prefill_tokens_per_s == 1000.0


def test_an_integer_will_do_where_a_float_is_declared() -> None:
    text = preset_path("oracle").read_text() + "timing: {lease_s: 4, heartbeat_s: 1}\n"
    assert load_bytes(text.encode(), "F").timing.lease_s == 4.0


def test_a_path_wins_where_it_looks_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "laptop").write_text(preset_path("oracle").read_text())
    monkeypatch.chdir(tmp_path)
    assert load_cluster("laptop").name == "laptop"
    assert load_cluster("./laptop").name == "oracle"
