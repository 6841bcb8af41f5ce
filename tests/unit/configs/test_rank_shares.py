"""Numbers of ranks are refused where the cluster file is read; what is accepted is what the loader accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.rank_shares import check_ranks
from configs.schema.pools import EngineConfig, PoolConfig
from protos.contract.errors import ConfigError

DENSE = {
    "model_type": "llama", "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 240, "intermediate_size": 96,
}  # fmt: skip
LATENT = {
    "model_type": "mistral4", "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 256, "n_routed_experts": 6,
    "moe_intermediate_size": 4, "n_shared_experts": 2, "intermediate_size": 7, "first_k_dense_replace": 0,
}  # fmt: skip


def pool(ranks: int, kind: str = "torch") -> PoolConfig:
    return PoolConfig(name=f"p{ranks}", role="combined", ranks=ranks, engine=EngineConfig(kind=kind))  # type: ignore[arg-type]


def folder(directory: Path, text: dict[str, object]) -> Path:
    outer = text if text["model_type"] == "llama" else {"model_type": "mistral3", "text_config": text}
    (directory / "config.json").write_text(json.dumps(outer))
    return directory


def test_every_pool_at_fault_is_named_with_what_would_do(tmp_path: Path) -> None:
    where = folder(tmp_path, DENSE)
    with pytest.raises(ConfigError) as caught:
        check_ranks([pool(2), pool(5), pool(3)], where)
    assert str(caught.value).splitlines() == [
        f"pools[1].ranks: 5 ranks cannot share num_attention_heads 12 of {where}; 1, 2, 4, 6, 12 can",
        f"pools[2].ranks: 3 ranks cannot share num_key_value_heads 2 of {where}; 1, 2, 4, 6, 12 can",
    ]


def test_experts_count_and_dense_widths_only_where_there_are_dense_layers(tmp_path: Path) -> None:
    check_ranks([pool(2)], folder(tmp_path, LATENT))
    with pytest.raises(ConfigError, match="n_routed_experts 6"):
        check_ranks([pool(4)], tmp_path)
    with pytest.raises(ConfigError, match="intermediate_size 7"):
        check_ranks([pool(2)], folder(tmp_path, {**LATENT, "first_k_dense_replace": 1}))


def test_one_rank_and_engines_that_share_nothing_need_no_checkpoint(tmp_path: Path) -> None:
    check_ranks([pool(1), pool(7, "oracle")], tmp_path / "nothing")
