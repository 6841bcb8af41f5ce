"""Two processes of one transport, told apart by their command line. Standard library only: every peer's Python runs it.

`python SCRIPT BLOCK_BYTES BLOCKS` measures: it starts `python SCRIPT target BLOCK_BYTES BLOCKS` and prints one JSON line of
GB/s from the first byte to the knowledge that all have arrived, and CPU seconds per GB of both sides.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

POLL_S = 0.0002  # of engines that only can be asked; their own threads move the bytes meanwhile

Target = Callable[["Peer", int, int], None]
Source = Callable[["Peer", int, int], Callable[[], None]]


class Peer:
    """The other process: lines of text, and nothing else. Libraries that print go to standard error."""

    def __init__(self, read: Callable[[], str], write: Callable[[str], object]) -> None:
        self._read = read
        self._write = write

    def tell(self, text: str) -> None:
        self._write(text + "\n")

    def hear(self) -> str:
        """The next line. Raises EOFError when the other process is gone."""
        line = self._read()
        if not line:
            raise EOFError("the other process is gone")
        return line.strip()


def cpu_s() -> float:
    """CPU seconds of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(source: Source, target: Target) -> None:
    """`source` connects, moves one block to warm up and returns what moves all of them; `target` returns when all are there."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if sys.argv[1] == "target":
        peer = Peer(sys.stdin.readline, answers.write)
        target(peer, int(sys.argv[2]), int(sys.argv[3]))
        peer.tell(str(cpu_s()))
        return
    block_bytes, blocks = int(sys.argv[1]), int(sys.argv[2])
    command = [sys.executable, sys.argv[0], "target", str(block_bytes), str(blocks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:
        assert child.stdin is not None and child.stdout is not None
        peer = Peer(child.stdout.readline, child.stdin.write)
        move = source(peer, block_bytes, blocks)
        peer.tell("begin")
        idle_s = float(peer.hear())
        before_s, started_s = cpu_s(), time.monotonic()
        move()
        elapsed_s, used_s = time.monotonic() - started_s, cpu_s() - before_s
        peer.tell("end")
        received_s = float(peer.hear()) - idle_s
    gigabytes = block_bytes * blocks / 1e9
    measured = {"gb_per_s": gigabytes / elapsed_s, "send_cpu_s_per_gb": used_s / gigabytes}
    print(json.dumps({**measured, "receive_cpu_s_per_gb": received_s / gigabytes}), file=answers)


def idle_until_end(peer: Peer) -> None:
    """For targets whose library receives by itself: marks the beginning of the clock and waits for its end."""
    begin(peer)
    peer.hear()


def begin(peer: Peer) -> None:
    """Waits for the source to be ready and says how much CPU was used until then."""
    peer.hear()
    peer.tell(str(cpu_s()))


def wait_for(is_over: Callable[[], bool], patience_s: float = 60.0) -> None:
    """Asks until it is over. Raises TimeoutError."""
    give_up_s = time.monotonic() + patience_s
    while not is_over():
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"a transfer did not end within {patience_s} s")
        time.sleep(POLL_S)
