"""A raw TCP socket between two processes: sendall from memory, recv_into memory, nothing else. What others are held against."""

from __future__ import annotations

import socket
import subprocess
import sys
import time


def receive(block_bytes: int, blocks: int) -> None:
    """Takes `blocks` into memory that is already touched, answers with one byte."""
    pool = memoryview(bytearray(b"\xff") * (block_bytes * blocks))
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
        with connection:
            for at in range(0, len(pool), block_bytes):
                block = pool[at : at + block_bytes]
                while block:
                    count = connection.recv_into(block)
                    if not count:
                        raise EOFError(f"the sender hung up with {len(pool) - at} bytes to go")
                    block = block[count:]
            connection.sendall(b"!")


def measure(block_bytes: int, blocks: int) -> float:
    """GB/s from the first byte to the answer."""
    command = [sys.executable, "-m", "tests.bench.kv.raw_socket", str(block_bytes), str(blocks)]
    pool = memoryview(bytearray(b"x") * (block_bytes * blocks))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        with socket.create_connection(("127.0.0.1", int(child.stdout.readline()))) as connection:
            started_s = time.monotonic()
            for at in range(0, len(pool), block_bytes):
                connection.sendall(pool[at : at + block_bytes])
            answered = connection.recv(1)
            elapsed_s = time.monotonic() - started_s
    assert answered == b"!" and child.returncode == 0
    return len(pool) / elapsed_s / 1e9


if __name__ == "__main__":
    receive(*map(int, sys.argv[1:]))
