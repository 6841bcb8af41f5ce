"""What the machine can do with some threads: `python -m tests.bench.engine.limits THREADS [read]` prints one JSON object.

Bandwidths in bytes/s, GEMM rates in FLOP/s (2 m n k); the best of several runs, because a limit is what was reached once.
With `read`, the median instead: what reading sustains for a second, to be compared with a decode of about a second beside
it. On a shared machine the best of many short reads is another quantity, half as large again at times.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Pick = Callable[[list[float]], float]

READ_SIZES = {"read_2gib": 2 << 30, "read_269mb": 269_000_000}
COPY_BYTES = 1 << 30
GEMM = 2048


def measure(threads: int, scale: int = 1, seconds: float = 1.5) -> dict[str, float]:
    """Every limit; `scale` divides the sizes, `seconds` is the time for each."""
    import torch

    torch.set_num_threads(threads)
    limits = {"copy": _copy_rate(COPY_BYTES // scale, seconds)}
    limits |= {name: _read_rate(size // scale, seconds) for name, size in READ_SIZES.items()}
    for name, dtype in (("gemm_bf16", torch.bfloat16), ("gemm_fp32", torch.float32)):
        limits[name] = _gemm_rate(max(GEMM // scale, 16), dtype, seconds)
    return limits


def measure_reads(threads: int, scale: int = 1, seconds: float = 1.0) -> dict[str, float]:
    """What reading sustains; on a shared machine it changes from minute to minute."""
    import torch

    torch.set_num_threads(threads)
    return {name: _read_rate(size // scale, seconds, statistics.median) for name, size in READ_SIZES.items()}


def _copy_rate(size: int, seconds: float) -> float:
    """Bytes read plus bytes written, as STREAM counts."""
    import torch

    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * size / _run_s(lambda: target.copy_(source), seconds)


def _read_rate(size: int, seconds: float, pick: Pick = min) -> float:
    """The better of a matrix-vector product and a sum over fp32 numbers; each reads every byte once."""
    import torch

    columns = 4096
    matrix, vector = torch.ones(size // 4 // columns, columns), torch.ones(columns)
    return matrix.nbytes / min(_run_s(lambda: matrix @ vector, seconds, pick), _run_s(matrix.sum, seconds, pick))


def _gemm_rate(side: int, dtype: torch.dtype, seconds: float) -> float:
    """Square matrices, the second one transposed as weights are."""
    import torch

    left, right = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    return 2 * side**3 / _run_s(lambda: left @ right.T, seconds)


def _run_s(work: Callable[[], object], seconds: float, pick: Pick = min) -> float:
    """One run's time, picked from as many as `seconds` hold."""
    work()
    times_s, until = [], time.perf_counter() + seconds
    while not times_s or time.perf_counter() < until:
        started_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - started_s)
    return pick(times_s)


if __name__ == "__main__":
    only_reads = sys.argv[2:] == ["read"]
    print(json.dumps((measure_reads if only_reads else measure)(int(sys.argv[1]))))
