"""The fit finds constants that points were made with, keeps the others, and errors are counted as they are defined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.catalog.loader import read_description
from orchestrator.costs import accuracy
from orchestrator.costs.constants import Constants, ConstantTable, dump, refitted, shipped_table
from orchestrator.costs.fit import fit
from orchestrator.costs.predictor import Predictor
from tests.unit.orchestrator.costs.points_csv import explained

PLANTED = {"gemm_compute": 0.7, "weight_memory": 0.85, "engine_step_s.vllm": 3e-3, "first_token_s.trtllm": 0.09}


def test_planted_constants_are_found(tmp_path: Path) -> None:
    table = shipped_table()
    priors = {name: constant.prior for name, constant in table.constants.items()}
    points = explained(tmp_path / "p.csv", {**priors, **PLANTED})
    found = fit(points, table)
    errors = accuracy.predicted(points, Constants(found.values)).errors("", range(len(points)))
    before = accuracy.predicted(points, Constants(priors)).errors("", range(len(points)))
    assert found.loss_after < 0.4 * found.loss_before
    assert errors.tpot_mape < 0.03 < before.tpot_mape
    assert errors.ttft_mape < 0.06 < before.ttft_mape
    for name, value in PLANTED.items():
        assert abs(np.log(found.values[name] / value)) < 0.6 * abs(np.log(priors[name] / value)), name
    for name, constant in table.constants.items():
        assert constant.low <= found.values[name] * (1 + 1e-9) and found.values[name] <= constant.high * (1 + 1e-9)
    assert found.values["first_token_s.sglang"] == table.constants["first_token_s.sglang"].value, "no point shows it"
    assert fit(points, table).values == found.values, "the same points give the same constants"


def test_milliseconds_for_seconds_do_not_fit(tmp_path: Path) -> None:
    table = shipped_table()
    points = explained(tmp_path / "p.csv", table.values())
    wrong = [replace(point, tpot_s=1e3 * point.tpot_s, ttft_s=1e3 * point.ttft_s) for point in points]
    assert accuracy.predicted(wrong, Constants(fit(wrong, table).values)).errors("", range(len(wrong))).tpot_mape > 0.9


def test_times_no_kernel_reaches_are_named(tmp_path: Path) -> None:
    points = explained(tmp_path / "p.csv", shipped_table().values())
    assert accuracy.beyond_kernels(points) == []
    points[5] = replace(points[5], tpot_s=points[5].tpot_s / 4)
    assert accuracy.beyond_kernels(points) == [5]


def test_errors_are_relative_and_groups_weigh_the_same(tmp_path: Path) -> None:
    points = explained(tmp_path / "p.csv", shipped_table().values())[:3]
    points = [
        replace(point, tpot_s=0.010, ttft_s=0.2, concurrency=clients)
        for point, clients in zip(points, (4, 32, 500), strict=True)
    ]
    found = accuracy.Predicted(points, np.array([0.011, 0.009, 0.020]), np.array([0.2, 0.1, 0.2]))
    whole = found.errors("all", [0, 1, 2])
    assert (whole.tpot_mape, whole.tpot_median, whole.tpot_bias) == (pytest.approx(0.4), pytest.approx(0.1), pytest.approx(0.1))
    assert whole.ttft_mape == pytest.approx(0.5 / 3)
    rows = found.by(accuracy.band)
    assert [row.label for row in rows] == ["clients   1 to   8", "clients   9 to  32", "clients 129 and more"]
    pair = [found.errors("a", [0, 1]), found.errors("b", [2])]
    assert accuracy.mean_of(pair, "mean").tpot_mape == pytest.approx((0.1 + 1.0) / 2)
    assert len(found.without([1]).points) == 2


def test_leaving_a_model_out_does_not_see_it(tmp_path: Path) -> None:
    table = shipped_table()
    points = [point for point in explained(tmp_path / "p.csv", table.values()) if point.model.name != "gpt-oss-120b"][::3]
    held_out = [replace(point, tpot_s=7 * point.tpot_s) if point.model.name == "qwen3-32b" else point for point in points]
    ours, theirs = (accuracy.leaving_one_out(rows, table) for rows in (points, held_out))
    qwen = [index for index, point in enumerate(points) if point.model.name == "qwen3-32b"]
    np.testing.assert_array_equal(ours.tpot_s[qwen], theirs.tpot_s[qwen])


def test_a_table_reads_back_as_it_was_written(tmp_path: Path) -> None:
    table = refitted(shipped_table(), {"gemm_compute": 0.5, "sequence_limit.vllm": 128}, 'a "quoted" run')
    path = tmp_path / "constants.yaml"
    path.write_text(dump(table))
    assert read_description(path, ConstantTable) == table


def test_shipped_constants_lie_within_their_bounds() -> None:
    for name, constant in shipped_table().constants.items():
        assert 0 < constant.low <= constant.prior <= constant.high, name
        assert constant.low <= constant.value <= constant.high, name


def test_the_point_of_a_stack_is_the_point_alone(tmp_path: Path) -> None:
    points = explained(tmp_path / "p.csv", shipped_table().values())[::17]
    together = Predictor.of(points).predict(Constants())
    for index, point in enumerate(points):
        alone = Predictor.of([point]).predict(Constants())
        np.testing.assert_allclose(np.asarray(together.ttft_s)[index], alone.ttft_s, rtol=1e-12)
        np.testing.assert_allclose(np.asarray(together.tpot_s)[index], alone.tpot_s, rtol=1e-12)
