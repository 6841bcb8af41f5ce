"""One engine over several ranks: the same tokens whatever their number, and KV that any number of ranks can take over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from configs.rank_shares import check_ranks
from configs.schema.pools import EngineConfig, ModelConfig, PoolConfig
from protos.contract.errors import ConfigError, ModelError
from tests.support.torch_groups import a_group
from tests.support.torch_models import hand_off, random_tokens, run_all
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engines.torch.build import read_parts
from workers.engines.torch.distributed_ranks import DistributedRanks
from workers.engines.torch.tiny import write_tiny

SHAPES = {
    "latent": ("mistral-small-4", {}),
    "grouped": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "grouped-2-kv-heads": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
}


def model_of(directory: Path, shape: str) -> Path:
    kind, changes = SHAPES[shape]
    return write_tiny(kind, directory / "model", 7, **changes)


def requests(count: int, max_tokens: int, **sampling: Any) -> list[EngineRequest]:
    return [
        EngineRequest(
            request_id=f"r{seed}",
            epoch=1,
            prompt=random_tokens(seed, 20 + 37 * seed),
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        )
        for seed in range(count)
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cluster_file_is_refused_for_what_the_loader_refuses(tmp_path: Path, shape: str) -> None:
    model_dir = model_of(tmp_path, shape)

    def is_accepted(act: Callable[[], object], refusal: type[Exception]) -> bool:
        try:
            act()
        except refusal:
            return False
        return True

    for size in range(2, 9):
        engine = EngineConfig(kind="torch")
        pool = PoolConfig(name="p", role="combined", ranks=size, engine=engine)
        parts = read_parts(ModelConfig(name="tiny", source=str(model_dir), dtype="float32"), engine, model_dir)
        ranks = DistributedRanks(size - 1, size, "127.0.0.1", torch.device("cpu"), 1.0)
        loads = is_accepted(lambda parts=parts, ranks=ranks: parts.load(ranks), ModelError)
        assert is_accepted(lambda pool=pool: check_ranks([pool], model_dir), ConfigError) == loads, f"{size} ranks"


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_do_not_depend_on_the_number_of_ranks(tmp_path: Path, shape: str) -> None:
    model_dir = model_of(tmp_path, shape)
    outputs = {}
    for ranks in (1, 2, 4):
        with a_group(model_dir, ranks) as (engine, _):
            outputs[ranks] = run_all(engine, requests(3, 64))
            engine.check_integrity()
    assert outputs[2] == outputs[1]
    assert outputs[4] == outputs[1]


@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_hand_off_changes_the_number_of_ranks_and_no_token(tmp_path: Path, shape: str, prefill: int, decode: int) -> None:
    model_dir = model_of(tmp_path, shape)
    with a_group(model_dir, 1) as (engine, _):
        expected = run_all(engine, requests(2, 16))
    with a_group(model_dir, prefill) as (source, _), a_group(model_dir, decode) as (target, _):
        assert source.layout == target.layout
        for request in requests(2, 16):
            assert hand_off(source, target, request) == expected[request.request_id]
