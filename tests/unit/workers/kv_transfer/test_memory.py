"""Memory of messages is used again instead of being fetched from the kernel anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CHURN = """
import resource, sys
if sys.argv[1] == "kept":
    from workers.kv_transfer.memory import keep_freed_memory
    assert keep_freed_memory()
def churn(times):
    for _ in range(times):
        bytes(bytearray(b"x" * (3 << 20)))
churn(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn(20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Page faults of pieces of 3 MiB that come and go, after the first ones."""
    done = subprocess.run([sys.executable, "-c", CHURN, how], capture_output=True, text=True, check=True, timeout=30)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_kept_memory_is_not_faulted_in_again() -> None:
    fresh, kept = faults("fresh"), faults("kept")
    assert kept < 1000 < fresh, "20 rounds of 3 pieces of 768 pages each"
