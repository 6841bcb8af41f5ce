"""The parts of the packing benchmark that decide what its figures mean; no times are asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.bench_kv import options_of
from tests.bench.kv import packing
from tests.bench.kv.packing import Speed, agreement, kv_groups, speed_of, speed_rows
from workers.engine_api.types import TokenLogprobs, TokenOut
from workers.engines.torch.tiny import write_tiny
from workers.kv_transfer.encodings import Encoding, codec_of


def test_the_break_even_is_where_both_ways_take_the_same_time() -> None:
    speed = Speed(share=0.7, pack_s_per_gb=1.0, unpack_s_per_gb=0.5)
    link = speed.pays_below_gb_per_s
    assert 1 / link == pytest.approx(0.7 / link + 1.5)
    by_metric = {one.metric: one.ours for one in speed_rows("case", [speed])}
    assert by_metric["pays on links below, overlapped"] == 1.0
    assert by_metric["KV packed, ratio"] == pytest.approx(1 / 0.7)


def out(token_id: int, *top: tuple[int, float]) -> TokenOut:
    logprobs = TokenLogprobs(0.0, tuple(i for i, _ in top), tuple(v for _, v in top)) if top else None
    return TokenOut("r", 1, 1, token_id, None, logprobs)


def test_agreement_counts_to_the_first_other_token() -> None:
    exact = [out(5, (5, -0.1), (6, -2.0)), out(7), out(8)]
    other = [out(5, (5, -0.2), (9, -2.0)), out(7), out(9)]
    found = agreement(exact, other)
    assert (found.same_tokens, found.new_tokens) == (2, 3)
    assert found.logprob_error == pytest.approx(0.1), "only of tokens that both name"
    assert agreement(exact, exact).same_tokens == 3


def test_lossless_continuations_are_the_exact_ones(tmp_path: Path) -> None:
    model = write_tiny("llama", tmp_path / "model", 3)
    layout, groups = kv_groups(model, "bfloat16", [16 + at for at in range(130)])
    assert len(groups) == 2 * layout.num_groups
    codec = codec_of(Encoding.LOSSLESS, layout)
    assert codec is not None and 0 < speed_of(codec, groups).share < 1
    prompts = [[20 + at, *range(30, 90 + at)] for at in range(2)]
    exact = packing.continuations(model, prompts, Encoding.NONE)
    assert [len(tokens) for tokens in exact.values()] == [packing.NEW_TOKENS - 1] * 2
    assert packing.continuations(model, prompts, Encoding.LOSSLESS) == exact
    fp8 = packing.continuations(model, prompts, Encoding.FP8)
    assert any(agreement(exact[name], fp8[name]).logprob_error > 0 for name in exact)


def test_packing_is_a_part_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert options_of(["--parts", "packing"]).parts == ["packing"]
    with pytest.raises(SystemExit):
        options_of(["--parts", "unpacking"])
    assert "transport,handoff,packing" in capsys.readouterr().err
