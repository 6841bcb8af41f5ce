"""The parts of the engine benchmark that decide what its figures mean; no times are asserted."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.bench import bench_engine, report
from tests.bench.engine import engines, limits
from tests.bench.engine.measure import (
    DECODE_PROMPT,
    INT8,
    Decode,
    Prefill,
    alternate,
    common_prefix,
    random_prompts,
    share_rows,
    speed_rows,
)
from tests.bench.engine.models import Work, work_of
from workers.engines.torch.tiny import write_tiny


class Clockwork:
    """Takes 1 ms per prompt token and 10 ms per step behind the first token; counts its runs."""

    def __init__(self, name: str, journal: list[str]) -> None:
        self.name = name
        self._journal = journal

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
        self._journal.append(self.name)
        return 0.001 * sum(map(len, prompts)) + 0.01 * (max_tokens - 1)

    def cpu_s(self) -> float:
        return 0.0


def test_rates_leave_out_what_they_should() -> None:
    rng, engine = random.Random(0), Clockwork("autan", [])
    decode, prefill = Decode(8, 32), Prefill(512)
    assert decode.rate(engine, decode.prompts(rng, 1000)) == pytest.approx(8 / 0.01)
    assert prefill.rate(engine, prefill.prompts(rng, 1000)) == pytest.approx(1000)
    assert {len(prompt) for prompt in decode.prompts(rng, 1000)} == {DECODE_PROMPT}


def test_a_decode_that_takes_no_time_is_refused() -> None:
    class Instant(Clockwork):
        def run(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
            return 1.0

    with pytest.raises(ValueError, match="one took"):
        Decode(1).rate(Instant("autan", []), [[1]])


def test_engines_take_turns_and_int8_answers_only_batch_1() -> None:
    journal: list[str] = []
    children = [Clockwork(name, journal) for name in ("autan", "peer", INT8)]
    begun: list[str] = []
    samples, idle = alternate(
        children, [Prefill(16), Decode(1, 4)], 3, 1000, lambda _: None, lambda case: begun.append(case.name)
    )
    assert begun == ["prefill 16"] * 3 + ["decode batch 1"] * 3
    prefill, decode = journal[: 2 * 4], journal[2 * 4 :]
    assert prefill == ["autan", "peer"] * 4
    assert decode[::2] == decode[1::2] == ["autan", "peer", INT8] * 4
    assert {case: {name: len(rates) for name, rates in seen.items()} for case, seen in samples.items()} == {
        "prefill 16": {"autan": 3, "peer": 3},
        "decode batch 1": {"autan": 3, "peer": 3, INT8: 3},
    }
    assert idle == {"autan": 0.0, "peer": 0.0, INT8: 0.0}


def test_rows_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    samples = {
        "decode batch 1": {"autan": [100.0, 120.0, 110.0], "peer": [55.0, 55.0, 55.0], INT8: [220.0]},
        "prefill 512": {"autan": [1000.0], "peer": [2000.0]},
    }
    work = Work(decode_bytes=10**9, token_flops=10**6, head_flops=0, attention_flops=0)
    machine = {"gemm_bf16": 4e9}
    reads = [{"read_2gib": rate, "read_269mb": 2 * rate} for rate in (200e9, 240e9, 220e9)]
    rows = speed_rows("m", samples, {"peer": "1.0"}) + share_rows("m", samples, work, machine, reads, {"peer": "1.0"})
    found = {(row.metric, row.peer): row for row in rows}
    decode = found["decode batch 1", "peer"]
    assert (decode.ours, decode.peer_value, decode.ratio, decode.spread, decode.runs) == (110, 55, 2, 20, 3)
    assert found["weight-only int8, decode batch 1", "autan bf16"].ratio == 2
    assert found["share of read 2gib", "peer"].ours == pytest.approx(50)
    assert found["share of read 269mb", "peer"].peer_value == pytest.approx(12.5)
    assert found["share of bf16 GEMM", "peer"].ours == pytest.approx(25)
    monkeypatch.setattr(report, "OUT", tmp_path)
    report.publish("engine", rows, threads=2)
    document = json.loads((tmp_path / "engine.json").read_text())
    keys = {"metric", "case", "unit", "ours", "peer", "peer_version", "peer_value", "ratio", "runs", "spread"}
    assert document["setup"]["threads"] == 2 and all(set(row) == keys for row in document["rows"])
    assert "peer 1.0: 55.00, ratio 2.00" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
def test_work_counts_what_a_token_reads(tmp_path: Path, tied: bool) -> None:
    dense = work_of(write_tiny("llama", tmp_path / "dense", 0, encoding="bf16", tie_word_embeddings=tied))
    hidden, inner, vocab, layers = 96, 192, 272, 3
    linear = layers * (hidden * 96 * 2 + 2 * hidden * 32 + 3 * hidden * inner)
    norms = (2 * layers + 1) * hidden
    assert dense.token_flops == 2 * linear
    assert dense.head_flops == 2 * hidden * vocab
    assert dense.decode_bytes == 2 * (linear + norms + hidden * vocab)
    assert dense.attention_flops == layers * 6 * 2 * 16


def test_common_prefix() -> None:
    assert [common_prefix([1, 2, 3], other) for other in ([1, 2, 3], [1, 2, 4], [2], [1, 2])] == [3, 2, 0, 2]


def test_limits_are_measured() -> None:
    found = limits.measure(1, scale=256, seconds=0.01)
    assert set(limits.measure_reads(1, scale=256, seconds=0.01)) == set(limits.READ_SIZES)
    assert set(found) == {"copy", "read_2gib", "read_269mb", "gemm_bf16", "gemm_fp32"} and min(found.values()) > 0


@pytest.mark.parametrize("bad", [["--models", "nine"], ["--cases", "x"], ["--rounds", "0"]])
def test_bad_options_end_with_code_2(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_engine.options_of(bad)
    assert ended.value.code == 2 and bad[0].lstrip("-") in capsys.readouterr().err


def test_our_engine_as_a_child(tmp_path: Path) -> None:
    model = write_tiny("llama", tmp_path / "model", 0, encoding="bf16")
    options = {"dtype": "bfloat16", "threads": 1, "context_tokens": 512, "max_running": 4}
    prompts = random_prompts(random.Random(1), 272, 1, 20)
    with engines.Child(engines.ours(1, 64), model, options, tmp_path / "log") as child:
        once, again = child.tokens(prompts, 7), child.tokens(prompts, 7)
        assert once == again and len(once[0]) == 7
        assert child.run(prompts, 2) > 0 and child.cpu_s() > 0
        with pytest.raises(engines.EngineFailed, match="of the prompt is outside"):
            child.run([[10**6]], 2)


def test_a_child_that_cannot_start_names_its_log(tmp_path: Path) -> None:
    child = engines.Child(engines.ours(1, 64), tmp_path / "absent", {}, tmp_path / "log")
    with pytest.raises(engines.EngineFailed, match="log"), child:
        pass
