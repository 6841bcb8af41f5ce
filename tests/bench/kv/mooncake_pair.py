"""Mooncake's transfer engine over TCP: one batched write of all blocks. Run by the Python of its environment; see pair.py."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["MC_FORCE_TCP"] = "1"
os.environ.setdefault("MC_LOG_LEVEL", "WARNING")

import numpy as np
from mooncake.engine import TransferEngine
from pair import Peer, idle_until_end, main


def _engine() -> TransferEngine:
    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise RuntimeError("Mooncake did not start")
    return engine


def target(peer: Peer, block_bytes: int, blocks: int) -> None:
    """Offers touched memory; Mooncake's own threads receive."""
    pool = np.full(block_bytes * blocks, 255, dtype=np.uint8)
    engine = _engine()
    if engine.register_memory(pool.ctypes.data, pool.nbytes) != 0:
        raise RuntimeError("Mooncake did not register the memory")
    peer.tell(f"127.0.0.1:{engine.get_rpc_port()} {pool.ctypes.data}")
    idle_until_end(peer)
    if int(pool.min()) != 7 or int(pool.max()) != 7:
        raise RuntimeError("the blocks did not arrive")


def source(peer: Peer, block_bytes: int, blocks: int) -> Callable[[], None]:
    """See pair.main."""
    pool = np.full(block_bytes * blocks, 7, dtype=np.uint8)
    engine = _engine()
    engine.register_memory(pool.ctypes.data, pool.nbytes)
    name, there = peer.hear().split()

    def write(count: int) -> None:
        here = [pool.ctypes.data + at * block_bytes for at in range(count)]
        remote = [int(there) + at * block_bytes for at in range(count)]
        if engine.batch_transfer_sync_write(name, here, remote, [block_bytes] * count) != 0:
            raise RuntimeError("Mooncake's transfer failed")

    write(1)
    return lambda: write(blocks)


if __name__ == "__main__":
    main(source, target)
