"""A CSV of serving points that a known table of constants explains exactly."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

from orchestrator.costs.constants import Constants
from orchestrator.costs.points import COLUMNS, MeasuredPoint, read_points
from orchestrator.costs.predictor import Predictor

SPLIT = [
    f"{role}_{column}"
    for role in ("prefill", "decode")
    for column in ("num_workers", "tp_size", "attention_dp_size", "moe_ep_size")
]


def row(**changes: object) -> dict[str, str]:
    """A complete row of the file, with some cells changed."""
    cells: dict[str, object] = dict.fromkeys((*COLUMNS, *SPLIT, "queue_limited"), "")
    cells |= {"id": "x", "backend": "vllm", "model_path": "meta-llama/Llama-3.1-8B", "system": "h100_sxm", "precision": ""}
    cells |= {"mode": "agg", "isl": 1024, "osl": 512, "conc": 8.0, "tp_size": 1.0}
    cells |= {"silicon_ttft_ms": 100.0, "silicon_tpot_ms": 8.0, "queue_limited": "False"}
    return {name: str(cell) for name, cell in (cells | changes).items()}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    """Writes the rows as a CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def varied() -> Iterator[dict[str, str]]:
    """Deployments and loads that show most constants."""
    models = (("meta-llama/Llama-3.1-8B", ""), ("Qwen/Qwen3-32B", "fp8"), ("openai/gpt-oss-120b", "fp4"))
    for (model, precision), backend, tensor, isl, clients in product(
        models, ("vllm", "trtllm"), (2, 8), (1024, 8000), (4, 32, 128)
    ):
        name = f"{model}_{backend}_{tensor}_{isl}_{clients}"
        yield row(id=name, model_path=model, precision=precision, backend=backend, tp_size=tensor, isl=isl, conc=clients)


def explained(path: Path, values: Mapping[str, float]) -> list[MeasuredPoint]:
    """Points of `varied` whose times are what these constants predict, to be exact."""
    points = read_points(write(path, list(varied())))
    found = Predictor.of(points).predict(Constants(values))
    ttft_s, tpot_s = np.asarray(found.ttft_s), np.asarray(found.tpot_s)
    return [replace(point, ttft_s=float(ttft_s[index]), tpot_s=float(tpot_s[index])) for index, point in enumerate(points)]
