"""A raw TCP socket: sendall from memory, recv_into memory, nothing else. See pair.py."""

from __future__ import annotations

import socket
from collections.abc import Callable

from pair import Peer, begin, main


def target(peer: Peer, block_bytes: int, blocks: int) -> None:
    """Receives a block to warm up, then all of them, into memory that is touched already."""
    pool = memoryview(bytearray(b"\xff") * (block_bytes * blocks))
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer.tell(str(server.getsockname()[1]))
        connection, _ = server.accept()
        with connection:
            _receive(connection, pool[:block_bytes])
            begin(peer)
            for at in range(0, len(pool), block_bytes):
                _receive(connection, pool[at : at + block_bytes])
            connection.sendall(b"!")
            peer.hear()


def source(peer: Peer, block_bytes: int, blocks: int) -> Callable[[], None]:
    """See pair.main."""
    pool = memoryview(bytearray(b"x") * (block_bytes * blocks))
    connection = socket.create_connection(("127.0.0.1", int(peer.hear())))
    connection.sendall(pool[:block_bytes])

    def move() -> None:
        for at in range(0, len(pool), block_bytes):
            connection.sendall(pool[at : at + block_bytes])
        if connection.recv(1) != b"!":
            raise EOFError("the receiver hung up")

    return move


def _receive(connection: socket.socket, block: memoryview) -> None:
    while block:
        count = connection.recv_into(block)
        if not count:
            raise EOFError("the sender hung up")
        block = block[count:]


if __name__ == "__main__":
    main(source, target)
