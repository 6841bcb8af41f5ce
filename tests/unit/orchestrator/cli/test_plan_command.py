"""`autan plan models | hardware | fit`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.catalog.loader import read_description
from orchestrator.cli.main import command_line
from orchestrator.costs.constants import ConstantTable, shipped_table
from protos.contract.errors import ConfigError
from tests.unit.orchestrator.costs.points_csv import row, varied, write


def run(*arguments: str) -> str:
    done = CliRunner().invoke(command_line("plan"), ["plan", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_models_are_listed_with_their_counts(tmp_path: Path) -> None:
    assert "119.40 B" in run("models")
    config = {"model_type": "llama", "hidden_size": 64, "vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 128, "max_position_embeddings": 512}))
    rows = {one["name"]: one for one in json.loads(run("models", "--json", "--config", str(tmp_path)))}
    assert rows["mistral-small-4"]["total_params"] == 119_401_298_944
    assert rows[tmp_path.name]["total_params"] == 2 * 6400 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64


def test_hardware_is_listed_and_its_json_names_sources() -> None:
    assert "rtxpro6000" in run("hardware")
    rows = {one["name"]: one for one in json.loads(run("hardware", "--json"))}
    assert "datasheet" in rows["h100"]["peaks"]["bf16_tflops"]["source"]


def test_a_fit_prints_constants_and_errors_and_writes_a_table(tmp_path: Path) -> None:
    csv = write(tmp_path / "points.csv", [cells for index, cells in enumerate(varied()) if index % 4 == 0])
    out = tmp_path / "table.yaml"
    document = json.loads(run("fit", str(csv), "--no-leave-out", "--out", str(out), "--json"))
    assert document["points"] == 18
    assert set(document["constants"]) == set(shipped_table().constants)
    assert [one["label"] for one in document["errors"]["fitted"]["means"]][-2:] == ["all points", "explicable points"]
    written = read_description(out, ConstantTable)
    assert written.constants["gemm_compute"].value == pytest.approx(document["constants"]["gemm_compute"]["value"], rel=1e-4)
    assert "points.csv" in written.provenance
    text = run("fit", str(csv), "--no-leave-out")
    assert "gemm_compute" in text and "mean of models" in text


def test_a_table_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    csv = write(tmp_path / "points.csv", [row()])
    with pytest.raises(ConfigError, match="cannot be written"):
        arguments = ["plan", "fit", str(csv), "--no-leave-out", "--out", str(tmp_path)]
        CliRunner().invoke(command_line("plan"), arguments, catch_exceptions=False)


def test_a_bad_file_is_a_configuration_error(tmp_path: Path) -> None:
    csv = write(tmp_path / "points.csv", [row(system="abacus")])
    with pytest.raises(ConfigError, match=r"points.csv:2: abacus: no such GPU"):
        CliRunner().invoke(command_line("plan"), ["plan", "fit", str(csv)], catch_exceptions=False)
