"""The KV plane. Four parts, each in files of its own (`--parts transport,handoff,packing,pool`):

    make bench-kv ARGS="--parts transport --blocks 64,256,1024,4096,16384 --megabytes 512 --rounds 5 --peers nixl,mooncake"
    make bench-kv ARGS="--parts handoff --models smollm2,tiny4 --prompts 1024,8192,32768 --rounds 5 --json"
    make bench-kv ARGS="--parts packing --models smollm2,tiny4 --rounds 5"

Transport: KV between two processes on loopback: this plane, a raw TCP socket, NIXL (UCX over TCP) and Mooncake (TCP), in turns.
Hand-off: requests on the torch engine beside the same ones without a hand-off; see tests/bench/kv/handoff.py.
Packing: what lossless and fp8 packing save and cost, and what fp8 does to tokens; see tests/bench/kv/packing.py.
Pool: a decode step on a pool that other processes may map, beside one on plain memory; see tests/bench/kv/pool_pages.py.

Every transport moves the same bytes from touched memory to touched memory; ours verifies a digest of each layer group, the
others verify nothing. The clock runs from the first byte to the moment at which the source knows that all have arrived.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from statistics import median

from tests.bench.kv import handoff, wire
from tests.bench.kv.peer_envs import ROOT, PeerEnv, PeerMissing, ensure_mooncake, ensure_nixl
from tests.bench.report import OUT, Row, publish, row

SOCKET = "raw TCP socket"
SHARED = "autan, shared memory"
GRPCIO = "autan, by grpcio"
PEERS: dict[str, tuple[str, Callable[[], PeerEnv]]] = {
    "nixl": ("NIXL, UCX over TCP", ensure_nixl),
    "mooncake": ("Mooncake, TCP", ensure_mooncake),
}
PARTS = ("transport", "handoff", "packing", "pool")
_TIMEOUT_S = 120.0

Measure = Callable[[int, int], dict[str, float]]


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with code 2 on bad usage."""
    parser = argparse.ArgumentParser(prog="bench kv", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
    parser.add_argument("--models", default=",".join(handoff.MODELS), help="of the hand-offs and of the packing")
    parser.add_argument("--prompts", default="1024,8192,32768", help="of the hand-offs: tokens")
    parser.add_argument("--chunk", type=int, default=512, help="of the hand-offs: tokens of a prefill step")
    parser.add_argument("--json", action="store_true", help="print the files too")
    parser.add_argument("--blocks", default="64,256,1024,4096,16384", help="block sizes in KiB, multiples of 64")
    parser.add_argument("--megabytes", type=int, default=512, help="how much each measurement moves")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default="nixl,mooncake", help="of nixl,mooncake; or none")
    parser.add_argument("--frame-kib", type=int, default=1024, help="our messages")
    parser.add_argument("--streams", default="1,4", help="ours: connections at once, each number measured")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 128 MB at 64 and 1024 KiB, and of prompts of 1024")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.megabytes, options.blocks, options.prompts = 2, 128, "64,1024", "1024"
    options.parts, options.models = options.parts.split(","), options.models.split(",")
    options.prompts = tuple(int(tokens) for tokens in options.prompts.split(","))
    if set(options.parts) - set(PARTS) or set(options.models) - set(handoff.MODELS):
        parser.error(f"--parts are of {','.join(PARTS)} and --models of " + ",".join(handoff.MODELS))
    if min(options.prompts) < 64:
        parser.error("--prompts are of 64 tokens at least")
    options.streams = tuple(int(count) for count in options.streams.split(","))
    if not all(1 <= count <= wire.MOST_STREAMS for count in options.streams):
        parser.error(f"--streams are of 1 to {wire.MOST_STREAMS}")
    options.blocks = tuple(int(size) for size in options.blocks.split(","))
    options.peers = tuple(name for name in options.peers.split(",") if name != "none")
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers {','.join(sorted(unknown))}: not one of {', '.join(PEERS)}")
    if any(size < 64 or size % 64 for size in options.blocks) or options.rounds < 1 or options.megabytes < 1:
        parser.error("--blocks are multiples of 64, --rounds and --megabytes positive")
    return options


def pair(script: str, env: PeerEnv) -> Measure:
    """Measures with one of the scripts beside this file: (block bytes, blocks) -> what it printed."""

    def measure(block_bytes: int, blocks: int) -> dict[str, float]:
        command = [str(env.python), str(ROOT / "tests" / "bench" / "kv" / script), str(block_bytes), str(blocks)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env={**os.environ, **env.variables}
        )
        if done.returncode != 0:
            raise PeerMissing(f"{script} failed: {done.stderr[-1000:]}")
        measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return measured

    return measure


def transports(options: argparse.Namespace) -> tuple[dict[str, Measure], dict[str, str]]:
    """What is measured, by name, and the versions of the peers. A peer that cannot be installed is left out, loudly."""

    def ours(streams: int) -> Measure:
        return lambda block_bytes, blocks: wire.measure(block_bytes // 1024, blocks, options.frame_kib, streams)

    def shared(block_bytes: int, blocks: int) -> dict[str, float]:
        return wire.measure(block_bytes // 1024, blocks, options.frame_kib, 1, wire.Way.SHARED)

    def by_grpcio(block_bytes: int, blocks: int) -> dict[str, float]:
        return wire.measure(block_bytes // 1024, blocks, options.frame_kib, 1, wire.Way.GRPC)

    python = PeerEnv(Path(sys.executable), sys.version.partition(" ")[0])
    found: dict[str, Measure] = {name_of(count): ours(count) for count in options.streams}
    found |= {GRPCIO: by_grpcio, SHARED: shared, SOCKET: pair("socket_pair.py", python)}
    versions = {SOCKET: python.version}
    for name in options.peers:
        title, ensure = PEERS[name]
        try:
            env = ensure()
        except PeerMissing as error:
            print(f"without {title}: {error}", flush=True)
            continue
        found[title], versions[title] = pair(f"{name}_pair.py", env), env.version
    return found, versions


def name_of(streams: int) -> str:
    """Ours, as it stands in the rows."""
    return f"autan, {streams} stream{'s' if streams > 1 else ''}"


def rows_of(case: str, samples: dict[str, list[dict[str, float]]], versions: dict[str, str]) -> list[Row]:
    """Each number of our streams beside each peer, then CPU seconds per GB of all."""
    speeds = {name: [one["gb_per_s"] for one in taken] for name, taken in samples.items()}
    found = []
    for name in speeds.keys() - versions.keys():
        ours = row(f"KV, {name}", case, "GB/s", speeds[name])
        peers = versions if name != SHARED else versions | dict.fromkeys(speeds.keys() - versions.keys() - {name}, "this tree")
        for peer, peer_version in peers.items():
            value = median(speeds[peer])
            found.append(replace(ours, peer=peer, peer_version=peer_version, peer_value=value, ratio=ours.ours / value))
    found.sort(key=lambda one: one.metric)
    for name, taken in samples.items():
        used = [one["send_cpu_s_per_gb"] + one["receive_cpu_s_per_gb"] for one in taken]
        found.append(row(f"CPU of both sides, {name}", case, "s/GB", used))
    return found


def transport_part(options: argparse.Namespace) -> None:
    """Every block size, all transports in turns; writes `kv.json`."""
    measures, versions = transports(options)
    rows: list[Row] = []
    for size_kib in options.blocks:
        blocks = max(1, options.megabytes * 1_000_000 // (size_kib * 1024))
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in measures}
        for _ in range(options.rounds):
            for name, measure in measures.items():
                try:
                    samples[name].append(measure(size_kib * 1024, blocks))
                except PeerMissing as error:
                    print(f"blocks of {size_kib} KiB without a run of {name}: {error}", flush=True)
        there = {name: taken for name, taken in samples.items() if taken}
        rows += rows_of(f"blocks of {size_kib} KiB", there, {name: versions[name] for name in versions if name in there})
    publish(
        "kv",
        rows,
        transfer_mb=options.megabytes,
        frame_kib=options.frame_kib,
        integrity="xxh3-128 of each layer group of 512 KiB at most, ours only",
        order="alternating, medians",
    )


def handoff_part(options: argparse.Namespace) -> None:
    """Every model and prompt size that its positions allow; writes `kv-handoff.json`."""
    rows: list[Row] = []
    for model in options.models:
        for tokens in options.prompts:
            if handoff.fits(model, tokens):
                rows += handoff.measure(model, tokens - handoff.SHORT_BY, options.chunk, options.rounds)
            else:
                print(f"without {model} at {tokens} tokens: it has too few positions", flush=True)
    publish(
        "kv-handoff",
        rows,
        workers="1 prefill + 1 decode beside 1 combined, one compute thread each; ingress, core and client in one process",
        chunk_tokens=options.chunk,
        dtype="bfloat16",
        order="alternating, medians",
    )


def packing_part(options: argparse.Namespace) -> None:
    """Every model that packing knows; writes `kv-packing.json`."""
    from tests.bench.kv import packing

    prompts = 4 if options.quick else 20
    rows = packing.measure(options.models, options.rounds, prompts)
    publish(
        "kv-packing",
        rows,
        kv_tokens=packing.KV_TOKENS,
        prompts=prompts,
        new_tokens=packing.NEW_TOKENS,
        zstandard=metadata.version("zstandard"),
        threads="1 packs and unpacks, CPU seconds of that thread; 1 computes",
    )


def pool_part(options: argparse.Namespace) -> None:
    """Every model; writes `kv-pool.json`."""
    from tests.bench.kv import pool_pages

    rows = [one for model in options.models for one in pool_pages.measure(model, options.rounds)]
    publish("kv-pool", rows, threads=1, dtype="bfloat16", order="alternating, medians")


def main(arguments: Sequence[str] | None = ()) -> None:
    """Runs the benchmark."""
    options = options_of(arguments)
    parts = {
        "transport": (transport_part, "kv.json"),
        "handoff": (handoff_part, "kv-handoff.json"),
        "packing": (packing_part, "kv-packing.json"),
        "pool": (pool_part, "kv-pool.json"),
    }
    for name in options.parts:
        run, file = parts[name]
        run(options)
        if options.json:
            print((OUT / file).read_text(), end="")


if __name__ == "__main__":
    main(None)
