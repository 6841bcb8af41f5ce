"""What the pools of a cluster file can hold."""

from __future__ import annotations

from collections.abc import Sequence

from configs.schema.pools import PoolConfig


def held_tokens(pools: Sequence[PoolConfig]) -> int:
    """Tokens of the longest sequence, prompt and output, that fits an instance of every role which it passes.

    A longer one would wait for ever: no instance could take it even when empty.
    """
    decode = max(_tokens(pool) for pool in pools if pool.role != "prefill")
    prefill = [_tokens(pool) for pool in pools if pool.role != "decode"]
    return min(decode, max(prefill, default=decode))


def _tokens(pool: PoolConfig) -> int:
    return pool.engine.num_blocks * pool.engine.block_tokens
