"""Tiers of the prefix cache: what the policy keeps on a real trace, and what bringing blocks back does to running sequences.

    make bench-tiers ARGS="--cases itl,trace --trace ../shared/data/traces/mooncake_conversation.jsonl"

`itl`: sequences of the oracle engine decode, a step every 10 ms, while a prompt of 500 MB of KV comes back from host memory or
the disk; beside it the same without a restore. `trace`: hit ratios of the tier policy, of plain LRU, and of the optimum that
knows the future (Belady), by the number of blocks that a tier holds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from pathlib import Path

from protos.contract.block_hash import block_hashes, root_hash
from tests.bench.report import Row, publish
from workers.batching.engine_limits import EngineLimits
from workers.batching.paged_engine import PagedEngine
from workers.batching.tier_policy import Retention
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engine_api.waiting import WorkWaiter
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.runner import OracleRunner
from workers.kv_tiers.disk_files import DiskFiles, slot_bytes_of
from workers.service.process import prefer_short_turns

ATTENTION_PER_BLOCK = 512 / 20_000  # relative cost of a block grows so much with each block before it
RESTORED_BYTES = 500_000_000


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench tiers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", default="itl,trace", help="of itl,trace")
    parser.add_argument("--trace", type=Path, default=Path("../shared/data/traces/mooncake_conversation.jsonl"))
    parser.add_argument("--blocks", default="1000,4000,16000,64000", help="sizes of the tier for the trace")
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes bench/tiers.json."""
    options = options_of(arguments)
    prefer_short_turns()  # as a worker does
    rows: list[Row] = []
    if "itl" in options.cases:
        for tier in ("host", "disk"):
            rows += itl_rows(tier, options.runs)
    if "trace" in options.cases:
        prompts = read_trace(options.trace)
        for size in map(int, options.blocks.split(",")):
            rows += trace_rows(prompts, size)
    publish("tiers", rows, restored_bytes=RESTORED_BYTES, trace=str(options.trace))


# -- what a restore does to running sequences ---------------------------------------------------------------------------


def itl_rows(tier: str, runs: int) -> list[Row]:
    """ITL of eight running sequences with and without a restore, and how fast that was."""
    found: dict[str, list[float]] = {}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            for what, value in restore_once(tier, Path(folder)).items():
                found.setdefault(what, []).append(value)
    return [
        Row(what, f"{tier}, 500 MB", what.rpartition(" ")[2], statistics.median(values), runs, max(values) - min(values))
        for what, values in found.items()
    ]


def restore_once(tier: str, folder: Path) -> dict[str, float]:
    """One engine: a prompt is computed, pushed out of the pool, and asked for again while others decode."""
    model = OracleModel("restore", num_layers=36, row_bytes=640, context_tokens=65_536)
    num_blocks = RESTORED_BYTES // (36 * 640 * 64)
    runner = OracleRunner(model, num_blocks=num_blocks + 40, block_tokens=64, prefill_tokens_per_s=2_000, decode_step_s=0.01)
    layout = runner.layout
    host_blocks = 2 * num_blocks if tier == "host" else 40
    files = DiskFiles(folder / "kv", 2 * num_blocks * slot_bytes_of(layout), model.identity, layout)
    limits = EngineLimits(max_batch_tokens=4096, max_running=16, host_cache_bytes=host_blocks * layout.block_bytes)
    engine = PagedEngine(runner, limits, files=files if tier == "disk" else None)
    rng = random.Random(1)
    prompt = tuple(rng.choices(range(3, 250), k=num_blocks * 64 + 1))
    serve(engine, "first", prompt)
    while engine.match_prefix(names_of(engine, prompt)):
        serve(engine, f"filler{rng.random()}", tuple(rng.choices(range(3, 250), k=8 * 64)))
        time.sleep(0.15 if tier == "disk" else 0.03)  # the io threads write what the filler pushes out
    for index in range(8):
        sampling = SamplingParams(max_tokens=20_000)
        engine.add(EngineRequest(request_id=f"d{index}", epoch=1, prompt=(5, 6, 7 + index), sampling=sampling))
    for _ in range(10):
        engine.step()
    alone = [timed_step(engine) for _ in range(100)]
    started = time.perf_counter()
    engine.add(EngineRequest(request_id="again", epoch=1, prompt=prompt, sampling=SamplingParams(max_tokens=1)))
    beside: list[float] = []
    while engine.stats().restoring:
        beside.append(timed_step(engine))
    took_s = time.perf_counter() - started
    stats = engine.stats()
    engine.abort("again", 1)
    restored = (stats.host_restored_tokens + stats.disk_restored_tokens) * 36 * 640
    engine.close()
    assert restored > 0.9 * RESTORED_BYTES, f"only {restored} bytes came back"
    return {
        "ITL alone p50 ms": 1000 * quantile(alone, 0.5),
        "ITL alone p99 ms": 1000 * quantile(alone, 0.99),
        "ITL beside a restore p50 ms": 1000 * quantile(beside, 0.5),
        "ITL beside a restore p99 ms": 1000 * quantile(beside, 0.99),
        "restored in steps": len(beside),
        "restore rate GB/s": restored / took_s / 1e9,
    }


def timed_step(engine: PagedEngine) -> float:
    """Seconds of one step, what the engine does between steps included."""
    started = time.perf_counter()
    assert engine.has_work()
    engine.step()
    return time.perf_counter() - started


def serve(engine: PagedEngine, request_id: str, prompt: tuple[int, ...]) -> None:
    """One prompt to its end."""
    engine.add(EngineRequest(request_id=request_id, epoch=1, prompt=prompt, sampling=SamplingParams(max_tokens=1)))
    waiter = WorkWaiter(engine)
    while waiter.wait():
        engine.step()


def names_of(engine: PagedEngine, prompt: tuple[int, ...]) -> list[bytes]:
    """The names of the prompt's blocks."""
    return block_hashes(root_hash(engine.identity.weights_digest, b""), prompt, engine.layout.block_tokens)


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# -- what the policy keeps ----------------------------------------------------------------------------------------------


def read_trace(path: Path) -> list[list[int]]:
    """The full blocks of every prompt of a Mooncake trace."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["hash_ids"][: line["input_length"] // 512] for line in lines]


def cost(depth: int) -> float:
    """Computing block `depth`, relative to the first one."""
    return 1 + ATTENTION_PER_BLOCK * depth


def by_policy(size: int) -> Callable[[list[int]], int]:
    """A tier as it is: leading blocks that it has, then all blocks of the prompt enter it."""
    order = Retention(size, cost)

    def request(prompt: list[int]) -> int:
        names = [number.to_bytes(16, "big") for number in prompt]
        hits = next((index for index, name in enumerate(names) if name not in order), len(names))
        parent = b"root"
        for depth, name in enumerate(names):
            if name in order:
                order.touch(name)
            else:
                order.add(name, parent, depth)
            parent = name
        while len(order) > size:
            victim = order.victim(lambda name: False)
            assert victim is not None
            order.remove(victim)
        return hits

    return request


def by_recency(size: int) -> Callable[[list[int]], int]:
    """Least recently used first, the last block of a prompt before its first."""
    kept: OrderedDict[int, None] = OrderedDict()

    def request(prompt: list[int]) -> int:
        hits = next((index for index, name in enumerate(prompt) if name not in kept), len(prompt))
        for name in reversed(prompt):
            kept[name] = None
            kept.move_to_end(name)
        while len(kept) > size:
            kept.popitem(last=False)
        return hits

    return request


def by_foresight(size: int, prompts: list[list[int]]) -> Callable[[list[int]], int]:
    """Whatever is needed last goes first: no policy hits more blocks."""
    never, last = len(prompts), {}
    next_use: list[list[int]] = []
    for index in range(len(prompts) - 1, -1, -1):
        next_use.append([last.get(name, never) for name in prompts[index]])
        last.update(dict.fromkeys(prompts[index], index))
    kept: dict[int, int] = {}
    heap: list[tuple[int, int]] = []

    def request(prompt: list[int]) -> int:
        hits = next((index for index, name in enumerate(prompt) if name not in kept), len(prompt))
        for name, at in zip(prompt, next_use.pop(), strict=True):
            kept[name] = at
            heappush(heap, (-at, name))
        while len(kept) > size:
            at, name = heappop(heap)
            if kept.get(name) == -at:
                del kept[name]
        return hits

    return request


def trace_rows(prompts: list[list[int]], size: int) -> list[Row]:
    """Hit ratio by blocks, and by what computing them costs, beside those of plain LRU and of the optimum."""
    made = {"policy": by_policy(size), "LRU": by_recency(size), "optimum": by_foresight(size, prompts)}
    blocks: dict[str, float] = {}
    saved: dict[str, float] = {}
    total = sum(len(prompt) for prompt in prompts)
    total_cost = sum(cost(depth) for prompt in prompts for depth in range(len(prompt)))
    for name, request in made.items():
        hits = [request(prompt) for prompt in prompts]
        blocks[name] = 100 * sum(hits) / total
        saved[name] = 100 * sum(cost(depth) for count in hits for depth in range(count)) / total_cost
    rows = []
    for metric, values in (("blocks hit", blocks), ("prefill cost saved", saved)):
        for peer in ("LRU", "optimum"):
            ours, other = values["policy"], values[peer]
            rows.append(Row(metric, f"{size} blocks, beside {peer}", "%", ours, 1, 0.0, peer, "", other, ours / other))
    return rows


if __name__ == "__main__":
    main()
