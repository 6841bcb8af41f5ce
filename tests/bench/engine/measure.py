"""Alternating rounds over the children, and the rows that follow from their times."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tests.bench.engine.models import Work
from tests.bench.report import Row

DECODE_PROMPT = 128
FIRST_ID = 16  # below are special tokens
INT8 = "autan int8"
OURS = "autan"

Prompts = list[list[int]]
Samples = dict[str, dict[str, list[float]]]  # case -> engine -> tokens/s, one per round


class Measured(Protocol):
    """What the rounds need of a child."""

    name: str

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> float: ...

    def cpu_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt and its first token."""

    prompt_tokens: int

    @property
    def name(self) -> str:
        return f"prefill {self.prompt_tokens}"

    def prompts(self, rng: random.Random, vocab: int) -> Prompts:
        return random_prompts(rng, vocab, 1, self.prompt_tokens)

    def rate(self, engine: Measured, prompts: Prompts) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / engine.run(prompts, 1)


@dataclass(frozen=True, slots=True)
class Decode:
    """Equal prompts of DECODE_PROMPT tokens, and `new_tokens` more for each behind the first.

    The rate comes from the difference of two runs, with `new_tokens + 1` tokens and with one, so that prefill and what
    a call costs once are in neither side.
    """

    batch: int
    new_tokens: int = 128

    @property
    def name(self) -> str:
        return f"decode batch {self.batch}"

    def prompts(self, rng: random.Random, vocab: int) -> Prompts:
        return random_prompts(rng, vocab, self.batch, DECODE_PROMPT)

    def rate(self, engine: Measured, prompts: Prompts) -> float:
        """Tokens per second of the whole batch. Raises ValueError when the longer run was not longer."""
        first_s = engine.run(prompts, 1)
        whole_s = engine.run(prompts, self.new_tokens + 1)
        if whole_s <= first_s:
            raise ValueError(f"{engine.name}: {self.new_tokens + 1} tokens took {whole_s:.3f} s, one took {first_s:.3f} s")
        return self.batch * self.new_tokens / (whole_s - first_s)


Case = Prefill | Decode


def random_prompts(rng: random.Random, vocab: int, batch: int, tokens: int) -> Prompts:
    """Ids above the special ones."""
    return [[rng.randrange(FIRST_ID, vocab) for _ in range(tokens)] for _ in range(batch)]


def alternate(
    engines: Sequence[Measured],
    cases: Sequence[Case],
    rounds: int,
    vocab: int,
    say: Callable[[str], None],
    begin_round: Callable[[Case], None] = lambda _: None,
) -> tuple[Samples, dict[str, float]]:
    """Every case: one uncounted run of each engine, then `rounds` times each engine in turn, on the same prompts.

    `begin_round` runs before each counted round.

    The second result is, for each engine, the share of one core that it used while others ran.
    """
    samples: Samples = {}
    idle_cpu_s = dict.fromkeys((engine.name for engine in engines), 0.0)
    others_s = dict(idle_cpu_s)
    for case in cases:
        # The int8 engine answers one question: what the weights' bytes are worth at batch 1.
        taking_part = [engine for engine in engines if engine.name != INT8 or case.name == Decode(1).name]
        rng = random.Random(case.name)
        for engine in taking_part:
            case.rate(engine, case.prompts(rng, vocab))
        seen: dict[str, list[float]] = {engine.name: [] for engine in taking_part}
        for _ in range(rounds):
            begin_round(case)
            prompts = case.prompts(rng, vocab)
            for engine in taking_part:
                others = [other for other in engines if other is not engine]
                before = [other.cpu_s() for other in others]
                rate, took_s = timed(lambda one=case, who=engine, what=prompts: one.rate(who, what))  # type: ignore[misc]
                seen[engine.name].append(rate)
                for other, cpu_s in zip(others, before, strict=True):
                    idle_cpu_s[other.name] += other.cpu_s() - cpu_s
                    others_s[other.name] += took_s
        samples[case.name] = seen
        say(f"{case.name}: " + ", ".join(f"{name} {statistics.median(rates):,.0f}" for name, rates in seen.items()))
    return samples, {name: idle_cpu_s[name] / (others_s[name] or 1.0) for name in idle_cpu_s}


def timed(work: Callable[[], float]) -> tuple[float, float]:
    """The result and the seconds that it took."""
    import time

    started_s = time.perf_counter()
    return work(), time.perf_counter() - started_s


def speed_rows(model: str, samples: Samples, versions: Mapping[str, str]) -> list[Row]:
    """Tokens/s of ours beside each peer's; the ratio is that of the medians."""
    rows = []
    for case, seen in samples.items():
        for peer in [name for name in seen if name not in (OURS, INT8)] or [""]:
            rows.append(compare(case, model, "tokens/s", seen[OURS], peer, versions.get(peer, ""), seen.get(peer)))
        if INT8 in seen:
            name = "weight-only int8, decode batch 1"
            rows.append(compare(name, model, "tokens/s", seen[INT8], "autan bf16", "this tree", seen[OURS]))
    return rows


def share_rows(
    model: str,
    samples: Samples,
    work: Work,
    limits: Mapping[str, float],
    reads: Sequence[Mapping[str, float]],
    versions: Mapping[str, str],
) -> list[Row]:
    """How much of the machine each engine uses: read bandwidth at batch 1, the bf16 GEMM rate while prefilling.

    `reads` are the read limits as they were in each round of batch 1: a round is compared with its own.
    """
    rows = []
    for case, seen in samples.items():
        if case == Decode(1).name:
            costs = {f"share of {name.replace('_', ' ')}": [work.decode_bytes / one[name] for one in reads] for name in READS}
        elif case.startswith("prefill"):
            tokens = int(case.split()[1])
            cost_s = work.prefill_flops(tokens) / tokens / limits["gemm_bf16"]
            costs = {"share of bf16 GEMM": [cost_s] * max(map(len, seen.values()))}
        else:
            continue
        for metric, per_token_s in costs.items():
            shares = {
                name: [100 * rate * cost for rate, cost in zip(rates, per_token_s, strict=False)]
                for name, rates in seen.items()
                if name != INT8
            }
            for peer in [name for name in shares if name != OURS] or [""]:
                title = f"{model}, {case}"
                rows.append(compare(metric, title, "%", shares[OURS], peer, versions.get(peer, ""), shares.get(peer)))
    return rows


READS = ("read_2gib", "read_269mb")


def compare(
    metric: str, case: str, unit: str, ours: Sequence[float], peer: str, version: str, theirs: Sequence[float] | None
) -> Row:
    """One row; without a peer its fields stay empty."""
    value = statistics.median(ours)
    row = Row(metric, case, unit, value, len(ours), max(ours) - min(ours), peer, version)
    if theirs is None:
        return row
    peer_value = statistics.median(theirs)
    return Row(metric, case, unit, value, len(ours), row.spread, peer, version, peer_value, value / peer_value)


def read_rows(model: str, reads: Sequence[Mapping[str, float]]) -> list[Row]:
    """The read limits of the rounds of batch 1."""
    return [
        compare("sustained reading beside decode batch 1", f"{model}, {name.replace('_', ' ')}", "GB/s", rates, "", "", None)
        for name in READS
        if (rates := [one[name] / 1e9 for one in reads])
    ]


def limit_rows(limits: Mapping[str, float]) -> list[Row]:
    """The machine's own figures: nothing of ours, so they stand in the same column without a peer."""
    bandwidth = [Row("machine limit", name.replace("_", " "), "GB/s", limits[name] / 1e9, 1, 0) for name in ("copy", *READS)]
    gemm = ("gemm_bf16", "gemm_fp32")
    return bandwidth + [Row("machine limit", name.replace("_", " "), "GFLOP/s", limits[name] / 1e9, 1, 0) for name in gemm]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that agree before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
