"""Reading measured points, and the traps of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.costs.points import read_points
from protos.contract.errors import ConfigError
from tests.unit.orchestrator.costs.points_csv import row, write


def test_a_row_becomes_a_deployment_and_a_load(tmp_path: Path) -> None:
    (point,) = read_points(write(tmp_path / "p.csv", [row(tp_size=4.0, precision="fp8", conc=64.0)]))
    assert (point.model.name, point.gpu.name, point.backend, point.concurrency) == ("llama-3.1-8b", "h100", "vllm", 64.0)
    assert (point.decode.layout.tensor, point.decode.layout.weights, point.decode.layout.kv) == (4, "fp8", "fp8")
    assert (point.ttft_s, point.tpot_s) == (0.1, 0.008)
    assert not point.split and not point.spread and not point.saturated


def test_rows_without_a_load_are_left_out(tmp_path: Path) -> None:
    points = read_points(write(tmp_path / "p.csv", [row(conc=""), row(id="kept")]))
    assert [point.name for point in points] == ["kept"]


def test_models_of_their_own_format_keep_it(tmp_path: Path) -> None:
    rows = [
        row(model_path="openai/gpt-oss-120b", precision="fp8"),
        row(model_path="deepseek-ai/DeepSeek-V3", precision="fp8", tp_size=8.0),
        row(model_path="deepseek-ai/DeepSeek-V3", precision="fp4", tp_size=8.0),
        row(model_path="nvidia/Llama-3.1-8B-Instruct-FP8"),
    ]
    layouts = [point.decode.layout for point in read_points(write(tmp_path / "p.csv", rows))]
    assert [(layout.weights, layout.kv) for layout in layouts] == [
        ("mxfp4", "bf16"),
        ("fp8", "bf16"),
        ("nvfp4", "fp8"),
        ("fp8", "fp8"),
    ]


def test_tensor_size_times_expert_size_is_no_number_of_gpus(tmp_path: Path) -> None:
    rows = [
        row(model_path="openai/gpt-oss-120b", tp_size=16.0, moe_tp_size=4.0, moe_ep_size=4.0),
        row(model_path="openai/gpt-oss-120b", tp_size=1.0, attention_dp_size=64.0, moe_tp_size=8.0, moe_ep_size=8.0),
        row(model_path="openai/gpt-oss-120b", tp_size=4.0, moe_tp_size=4.0, moe_ep_size=1.0),
    ]
    layouts = [point.decode.layout for point in read_points(write(tmp_path / "p.csv", rows))]
    assert [(layout.tensor, layout.data, layout.expert) for layout in layouts] == [(4, 1, 4), (1, 8, 8), (4, 1, 1)]


def test_two_pools(tmp_path: Path) -> None:
    cells = {"prefill_num_workers": 2.0, "prefill_tp_size": 1.0, "prefill_attention_dp_size": 8.0, "prefill_moe_ep_size": 8.0}
    cells |= {"decode_num_workers": 3.0, "decode_tp_size": 16.0, "decode_moe_ep_size": 16.0}
    (point,) = read_points(write(tmp_path / "p.csv", [row(model_path="deepseek-ai/DeepSeek-V3", mode="disagg", **cells)]))
    assert point.split
    assert (point.prefill.instances, point.prefill.layout.data, point.prefill.layout.expert) == (2, 8, 8)
    assert (point.decode.instances, point.decode.layout.tensor, point.decode.layout.expert_tensor) == (3, 16, 1)


@pytest.mark.parametrize("name", ["2026_04_06_llama_c4", "dsr1_h200_1024x1024_c4_cfg81"])
def test_benchmarks_that_draw_lengths_have_shorter_means(tmp_path: Path, name: str) -> None:
    (point,) = read_points(write(tmp_path / "p.csv", [row(id=name)]))
    assert point.spread
    assert (point.prompt_tokens, point.output_tokens) == (pytest.approx(921.6), pytest.approx(460.8))


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"model_path": "meta-llama/Llama-9"}, "p.csv:3: meta-llama/Llama-9: no such model"),
        ({"system": "abacus"}, "p.csv:3: abacus: no such GPU"),
        ({"precision": "fp3"}, "p.csv:3: precision 'fp3' is not known"),
        ({"silicon_tpot_ms": "-1"}, "p.csv:3: silicon_tpot_ms '-1' is no positive number"),
        ({"silicon_tpot_ms": "nan"}, "p.csv:3: silicon_tpot_ms 'nan' is no positive number"),
        ({"isl": "many"}, "p.csv:3: could not convert"),
        ({"tp_size": "1.5"}, "p.csv:3: tp_size '1.5' is no count"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, cells: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("'", ".")):
        read_points(write(tmp_path / "p.csv", [row(), row(**cells)]))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_points(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("id,backend\n1,vllm\n")
    with pytest.raises(ConfigError, match=r"column .*silicon_tpot_ms.* is missing"):
        read_points(tmp_path / "other.csv")
    with pytest.raises(ConfigError, match="no row has conc"):
        read_points(write(tmp_path / "empty.csv", [row(conc="")]))
