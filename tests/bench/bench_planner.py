"""The cost model against measured serving points of models that its constants have not seen.

    python -m tests.bench planner --points ../shared/data/measured/serving_points_fit.csv

Every model is left out in turn, on all its GPUs and engines, and predicted from constants fitted to the others. The peer's
figures are those of AIConfigurator 0.12, which has measured tables for these models, on 1,299 points of the same sample.
Rows: mean of absolute relative errors, their median, and the median with its sign, in percent; one run, nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.costs.accuracy import Errors, beyond_kernels, leaving_one_out, summary
from orchestrator.costs.constants import shipped_table
from orchestrator.costs.points import read_points
from tests.bench.report import Row, publish, row

POINTS = Path("../shared/data/measured/serving_points_fit.csv")
PEER, PEER_VERSION = "AIConfigurator", "0.12"
# Of all its points, and above 128 clients.
PEER_MAPE = {("TPOT", "all points"): 20.0, ("TTFT", "all points"): 48.0, ("TTFT", "clients 129 and more"): 86.0}


def main(arguments: Sequence[str] = ()) -> None:
    """Prints and writes the rows."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench planner", description="Errors of the cost model.")
    parser.add_argument("--points", type=Path, default=POINTS, help="CSV of measured serving points")
    options = parser.parse_args(arguments)
    points = read_points(options.points)
    beyond = beyond_kernels(points)
    parts = summary(leaving_one_out(points, shipped_table()), beyond)
    rows = [one for errors in parts.values() for error in errors for one in rows_of(error)]
    publish("planner", rows, points=len(points), beyond_kernels=[points[index].name for index in beyond])


def rows_of(errors: Errors) -> list[Row]:
    """The figures of one set of points, with the peer's where it has one."""
    found = []
    for time, mape, median, bias in (
        ("TPOT", errors.tpot_mape, errors.tpot_median, errors.tpot_bias),
        ("TTFT", errors.ttft_mape, errors.ttft_median, errors.ttft_bias),
    ):
        for metric, value in (("MAPE", mape), ("median", median), ("bias", bias)):
            one = row(f"{time} {metric}, model left out", errors.label, "%", [100 * value])
            peer = PEER_MAPE.get((time, errors.label)) if metric == "MAPE" else None
            if peer is not None:
                one = replace(one, peer=PEER, peer_version=PEER_VERSION, peer_value=peer, ratio=one.ours / peer)
            found.append(one)
    return found
