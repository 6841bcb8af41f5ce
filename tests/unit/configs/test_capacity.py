"""The longest sequence that the pools hold."""

from __future__ import annotations

from configs.capacity import held_tokens
from configs.schema.pools import EngineConfig, PoolConfig


def pool(name: str, role: str, num_blocks: int) -> PoolConfig:
    engine = EngineConfig(kind="oracle", block_tokens=16, num_blocks=num_blocks)
    return PoolConfig.model_validate({"name": name, "role": role, "engine": engine})


def test_a_sequence_must_fit_a_prefill_and_a_decode_instance() -> None:
    assert held_tokens([pool("p", "prefill", 10), pool("d", "decode", 30)]) == 160
    assert held_tokens([pool("p", "prefill", 30), pool("d", "decode", 10)]) == 160


def test_the_largest_pool_of_a_role_counts() -> None:
    assert held_tokens([pool("a", "prefill", 4), pool("b", "prefill", 20), pool("d", "decode", 30)]) == 320
    assert held_tokens([pool("a", "decode", 4), pool("p", "prefill", 90), pool("d", "decode", 30)]) == 480


def test_a_combined_pool_serves_both_roles() -> None:
    assert held_tokens([pool("c", "combined", 12)]) == 192
    assert held_tokens([pool("c", "combined", 12), pool("p", "prefill", 90)]) == 192
