"""A long prompt through two layers with the real head dimensions of Mistral Small 4: time, memory, and decode by context.

Two cases: 262,144 tokens with 4 heads, 32,768 with 32 heads; bf16, 2 threads, chunked prefill through the engine. Each runs
in a process of its own. Memory is the peak resident size during the run, less what was resident after loading, less the KV
blocks that the prompt filled. Decode is measured at an eighth, a quarter, a half and the whole of the context (prefixes of
the prompt, from the prefix cache) and fitted by a line.

Usage of a smaller case:
    python -m tests.bench.bench_long_context --tokens 16384 --heads 4
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from configs.schema.pools import EngineConfig, ModelConfig
from tests.bench.report import Row, publish, row
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engines.torch.build import create_engine
from workers.engines.torch.tiny import write_tiny

THREADS = 2
CHUNK_TOKENS = 4096
BLOCK_TOKENS = 64
DECODED = 12  # the first of each run warms up and is not counted
CASES = ((262_128, 4), (32_768, 32))  # with the tokens decoded after it the first fills the supported context of 262,144
DIMS = {
    "hidden_size": 512, "num_hidden_layers": 2, "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One case: seconds, bytes, and milliseconds per decoded token by context."""

    prefill_s: float
    peak_bytes: int
    decode_ms: dict[int, list[float]]


def main() -> None:
    """Both cases, then the table."""
    report([(tokens, heads, run_apart(tokens, heads)) for tokens, heads in CASES])


def report(found: list[tuple[int, int, Found]]) -> None:
    """Writes and prints the figures of the cases."""
    rows: list[Row] = []
    for tokens, heads, one in found:
        case = f"{tokens} tokens, {heads} heads"
        rows.append(row("prefill wall time", case, "s", [one.prefill_s]))
        rows.append(row("prefill rate", case, "tokens/s", [tokens / one.prefill_s]))
        rows.append(row("peak beyond weights and KV", case, "MB", [one.peak_bytes / 1e6]))
        for context, times in sorted(one.decode_ms.items()):
            rows.append(row("decode", f"at {context}, {heads} heads", "ms/token", times))
        slope, base, worst = line_of({context: statistics.median(times) for context, times in one.decode_ms.items()})
        rows.append(row("decode, slope of the line", case, "ms/1k tokens", [slope * 1000]))
        rows.append(row("decode, line at context 0", case, "ms", [base]))
        rows.append(row("decode, worst distance from it", case, "%", [worst * 100]))
    publish("long_context", rows, threads=THREADS, chunk_tokens=CHUNK_TOKENS, dtype="bfloat16", layers=2)


def line_of(points: dict[int, float]) -> tuple[float, float, float]:
    """Slope and value at 0 of the least-squares line, and the greatest distance of a point as a share of its value."""
    slope, base = np.polyfit(list(points), list(points.values()), 1)
    worst = max(abs(base + slope * at - value) / value for at, value in points.items())
    return float(slope), float(base), float(worst)


def run_apart(tokens: int, heads: int) -> Found:
    """One case in its own process, its progress shown."""
    command = [sys.executable, "-m", "tests.bench.bench_long_context", "--tokens", str(tokens), "--heads", str(heads), "--raw"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        *_, last = child.stdout
    if child.returncode:
        raise RuntimeError(f"the case of {tokens} tokens ended with {child.returncode}")
    raw = json.loads(last)
    return Found(raw["prefill_s"], raw["peak_bytes"], {int(at): times for at, times in raw["decode_ms"].items()})


def measure(tokens: int, heads: int) -> Found:
    """The case in this process."""
    with tempfile.TemporaryDirectory() as folder:
        dims = {"num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 2 * tokens}
        source = write_tiny("mistral-small-4", Path(folder) / "model", 1, encoding="bf16", **DIMS, **dims)
        engine = create_engine(
            ModelConfig(name="long", source=str(source), dtype="bfloat16"),
            EngineConfig(
                kind="torch",
                threads=THREADS,
                block_tokens=BLOCK_TOKENS,
                num_blocks=2 * tokens // BLOCK_TOKENS + 64,
                max_batch_tokens=CHUNK_TOKENS,
            ),
            source,
        )
    prompt = tuple(np.random.default_rng(1).integers(16, 272, tokens).tolist())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    resident = _status("VmRSS")
    started = time.perf_counter()
    decode = {}
    prefill_s = 0.0
    for share in (1, 2, 4, 8):
        times = generate(engine, prompt[: tokens // share], started)
        prefill_s = prefill_s or times[0]
        decode[tokens // share] = [1000 * one for one in times[2:]]
    kv_bytes = -(-(tokens + DECODED) // BLOCK_TOKENS) * engine.layout.block_bytes
    peak = _status("VmHWM") - resident - kv_bytes
    engine.close()
    return Found(prefill_s, peak, decode)


def generate(engine: Engine, prompt: tuple[int, ...], started: float) -> list[float]:
    """Seconds until the first token, then seconds between tokens."""
    sampling = SamplingParams(max_tokens=DECODED, min_tokens=DECODED)
    engine.add(EngineRequest(request_id=f"r{len(prompt)}", epoch=1, prompt=prompt, sampling=sampling))
    times: list[float] = []
    done, last = 0, time.perf_counter()
    while engine.has_work():
        result = engine.step()
        assert not result.failed, result.failed
        if result.tokens:
            now = time.perf_counter()
            times.append(now - last)
            last = now
        else:
            done += CHUNK_TOKENS
            if done // CHUNK_TOKENS % 4 == 0:
                elapsed = time.perf_counter() - started
                print(f"  {done:>7} of {len(prompt)} tokens, {elapsed:.0f} s", file=sys.stderr, flush=True)
    return times


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(key + ":"))
    return 1024 * int(value)


def _command() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_long_context")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--raw", action="store_true", help="print one JSON line instead of the table")
    options = parser.parse_args()
    found = measure(options.tokens, options.heads)
    if options.raw:
        print(json.dumps(asdict(found)))
    else:
        report([(options.tokens, options.heads, found)])


if __name__ == "__main__":
    _command()
