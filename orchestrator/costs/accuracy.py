"""How well predictions meet measured points: by group, by model, by load; and which measurements no kernel explains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestrator.costs.constants import Constants, ConstantTable
from orchestrator.costs.fit import fit
from orchestrator.costs.points import MeasuredPoint
from orchestrator.costs.predictor import Predictor

Vector = NDArray[np.float64]
BANDS = (8.0, 32.0, 128.0)  # clients
PLAUSIBLE = 0.97  # of the fastest time; the rest is rounding and lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Relative errors of some points: mean and median of their sizes, and their median with its sign."""

    label: str
    points: int
    tpot_mape: float
    tpot_median: float
    tpot_bias: float
    ttft_mape: float
    ttft_median: float
    ttft_bias: float


@dataclass(frozen=True, slots=True)
class Predicted:
    """Points and what was predicted for each."""

    points: Sequence[MeasuredPoint]
    tpot_s: Vector
    ttft_s: Vector

    def errors(self, label: str, chosen: Sequence[int]) -> Errors:
        """Of the points with these indices."""
        tpot = np.array([self.tpot_s[i] / self.points[i].tpot_s - 1.0 for i in chosen])
        ttft = np.array([self.ttft_s[i] / self.points[i].ttft_s - 1.0 for i in chosen])
        return Errors(
            label=label,
            points=len(chosen),
            tpot_mape=float(np.mean(np.abs(tpot))),
            tpot_median=float(np.median(np.abs(tpot))),
            tpot_bias=float(np.median(tpot)),
            ttft_mape=float(np.mean(np.abs(ttft))),
            ttft_median=float(np.median(np.abs(ttft))),
            ttft_bias=float(np.median(ttft)),
        )

    def by(self, key: Callable[[MeasuredPoint], str]) -> list[Errors]:
        """One row for each value of the key, sorted by it."""
        found: dict[str, list[int]] = {}
        for index, point in enumerate(self.points):
            found.setdefault(key(point), []).append(index)
        return [self.errors(label, found[label]) for label in sorted(found)]

    def without(self, dropped: Sequence[int]) -> Predicted:
        """The points with other indices."""
        kept = [index for index in range(len(self.points)) if index not in set(dropped)]
        return Predicted([self.points[index] for index in kept], self.tpot_s[kept], self.ttft_s[kept])


def mean_of(rows: Sequence[Errors], label: str) -> Errors:
    """The rows' mean: each weighs the same, however many points it has."""
    columns = {name: float(np.mean([asdict(row)[name] for row in rows])) for name in asdict(rows[0]) if "_" in name}
    return Errors(label=label, points=sum(row.points for row in rows), **columns)


def band(point: MeasuredPoint) -> str:
    """Which load a point belongs to, by its clients."""
    at = sum(point.concurrency > limit for limit in BANDS)
    lowest = (1.0, *(limit + 1 for limit in BANDS))[at]
    return f"clients {lowest:3.0f} to {BANDS[at]:3.0f}" if at < len(BANDS) else f"clients {lowest:3.0f} and more"


def summary(found: Predicted, beyond: Sequence[int]) -> dict[str, list[Errors]]:
    """Rows by group, by model and by load, their means, and the means without the points in `beyond`."""
    kept = found.without(beyond)
    parts = {"group": lambda point: point.group, "model": lambda point: point.model.name, "band": band}
    rows: dict[str, list[Errors]] = {name: found.by(key) for name, key in parts.items()}
    rows["means"] = [
        mean_of(rows["group"], "mean of groups"),
        mean_of(rows["model"], "mean of models"),
        mean_of(kept.by(parts["group"]), "mean of groups, explicable points"),
        mean_of(kept.by(parts["model"]), "mean of models, explicable points"),
        found.errors("all points", range(len(found.points))),
        kept.errors("explicable points", range(len(kept.points))),
    ]
    return rows


def predicted(points: Sequence[MeasuredPoint], constants: Constants) -> Predicted:
    """With these constants."""
    found = Predictor.of(points).predict(constants)
    return Predicted(points, np.asarray(found.tpot_s), np.asarray(found.ttft_s))


def leaving_one_out(points: Sequence[MeasuredPoint], table: ConstantTable) -> Predicted:
    """Predicts each model, on all its GPUs and engines, with constants fitted to the other models alone."""
    tpot_s, ttft_s = np.zeros(len(points)), np.zeros(len(points))
    for name in sorted({point.model.name for point in points}):
        held_out = [index for index, point in enumerate(points) if point.model.name == name]
        others = [point for point in points if point.model.name != name]
        constants = Constants(fit(others, table).values if others else table.values())
        found = predicted([points[index] for index in held_out], constants)
        tpot_s[held_out], ttft_s[held_out] = found.tpot_s, found.ttft_s
    return Predicted(points, tpot_s, ttft_s)


def beyond_kernels(points: Sequence[MeasuredPoint]) -> list[int]:
    """Indices of points whose time per token no kernel explains: cached prompts, drafts, or wrong labels.

    The bound lets every operator run as fast as its best kernel alone, with full overlap and no other cost, for as many
    requests as Little's law says were running.
    """
    little = [
        replace(point, concurrency=point.concurrency / (1.0 + point.ttft_s / (point.tpot_s * point.output_tokens)))
        for point in points
    ]
    fastest = Predictor.of(little).predict(Constants(_kernels_alone()))
    return [i for i, point in enumerate(points) if point.tpot_s < PLAUSIBLE * np.asarray(fastest.tpot_s)[i]]


def _kernels_alone() -> dict[str, float]:
    free = 1e-12
    values = dict.fromkeys(Constants().values, free)
    values.update({name: value for name, value in Constants().values.items() if name.startswith("sequence_limit")})
    kernels = ("gemm_compute", "weight_memory", "expert_compute", "expert_memory", "attention_compute", "attention_memory")
    return {**values, **dict.fromkeys(kernels, 1.0), "expert_imbalance": 1.0, "overlap_power": 40.0, "link": 1.6}
