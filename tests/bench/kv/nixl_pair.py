"""NIXL with UCX over TCP: one WRITE of all blocks, ended by a notification; for the Python of its environment, see pair.py."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["UCX_TLS"] = "tcp"
os.environ["UCX_NET_DEVICES"] = "lo"

import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config
from pair import Peer, idle_until_end, main, wait_for


def target(peer: Peer, block_bytes: int, blocks: int) -> None:
    """Offers touched memory; UCX's own thread receives."""
    pool = np.full(block_bytes * blocks, 255, dtype=np.uint8)
    agent = nixl_agent("target", nixl_agent_config(backends=["UCX"]))
    registered = agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "pool")], "DRAM")
    peer.tell(f"{pool.ctypes.data} {agent.get_agent_metadata().hex()}")
    agent.add_remote_agent(bytes.fromhex(peer.hear()))
    idle_until_end(peer)
    if int(pool.min()) != 7 or int(pool.max()) != 7:
        raise RuntimeError("the blocks did not arrive")
    agent.deregister_memory(registered)


def source(peer: Peer, block_bytes: int, blocks: int) -> Callable[[], None]:
    """See pair.main."""
    pool = np.full(block_bytes * blocks, 7, dtype=np.uint8)
    agent = nixl_agent("source", nixl_agent_config(backends=["UCX"]))
    agent.register_memory([(pool.ctypes.data, pool.nbytes, 0, "pool")], "DRAM")
    there, metadata = peer.hear().split()
    name = agent.add_remote_agent(bytes.fromhex(metadata))
    peer.tell(agent.get_agent_metadata().hex())

    def write(count: int) -> None:
        here = [(pool.ctypes.data + at * block_bytes, block_bytes, 0) for at in range(count)]
        remote = [(int(there) + at * block_bytes, block_bytes, 0) for at in range(count)]
        local, far = agent.get_xfer_descs(here, "DRAM"), agent.get_xfer_descs(remote, "DRAM")
        handle = agent.initialize_xfer("WRITE", local, far, name, b"written")
        state = agent.transfer(handle)
        wait_for(lambda: state == "DONE" or _is_done(agent.check_xfer_state(handle)))
        agent.release_xfer_handle(handle)

    write(1)
    return lambda: write(blocks)


def _is_done(state: str) -> bool:
    if state not in ("DONE", "PROC"):
        raise RuntimeError(f"NIXL: {state}")
    return state == "DONE"


if __name__ == "__main__":
    main(source, target)
