"""Fits the constants of the cost model to measured serving points.

A bounded, damped Gauss-Newton on the logarithms of the constants. An error is predicted over measured, less one; each
group of points (points.MeasuredPoint.group) weighs the same however many it has; absolute errors count, not squares
(iteratively reweighted), so rows that no model explains do not bend the rest; and every constant is held to its prior, so
what the points do not show keeps the value that the reference tables give it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.costs.constants import Constants, ConstantTable
from orchestrator.costs.points import MeasuredPoint
from orchestrator.costs.predictor import Predictor

Vector = NDArray[np.float64]
TTFT_WEIGHT = 0.6  # an error of a time to first token against the same error of a time per token
PRIOR_WEIGHT = 0.02  # of a constant one spread away from its prior, against a group that is off by 100 %
LARGEST = 6.0  # errors beyond it count as it
SMALLEST = 0.02  # residuals below it count as squares
ROUNDS = 12
STEP = 1e-3


@dataclass(frozen=True, slots=True)
class Fitted:
    """The constants that fit, and how the loss fell."""

    values: dict[str, float]
    loss_before: float
    loss_after: float
    rounds: int


def fit(points: Sequence[MeasuredPoint], table: ConstantTable) -> Fitted:
    """Constants for these points, starting from the priors of the table; the same points and table give the same result."""
    problem = _Problem.of(points, table)
    logs = np.log([table.constants[name].prior for name in problem.names])
    low = np.log([table.constants[name].low for name in problem.names])
    high = np.log([table.constants[name].high for name in problem.names])
    loss = first = problem.loss(logs)
    damping = 1e-2
    rounds = 0
    while rounds < ROUNDS:
        rounds += 1
        residuals, weights = problem.residuals(logs)
        jacobian = _jacobian(problem, logs, residuals)
        better, logs, after, damping = _descend(problem, logs, (residuals, weights, jacobian), (low, high), loss, damping)
        gain, loss = loss - after, after
        if not better or gain < 1e-4 * loss:
            break
    return Fitted(
        values={**table.values(), **dict(zip(problem.names, np.exp(logs).tolist(), strict=True))},
        loss_before=first,
        loss_after=loss,
        rounds=rounds,
    )


@dataclass(frozen=True)
class _Problem:
    names: list[str]
    predictor: Predictor
    measured_s: Vector  # times per token, then times to first token
    weights: Vector
    priors: Vector
    spreads: Vector
    fixed: Mapping[str, float]

    @classmethod
    def of(cls, points: Sequence[MeasuredPoint], table: ConstantTable) -> _Problem:
        backends = {point.backend for point in points}
        names = [
            name
            for name, constant in table.constants.items()
            if constant.low < constant.high and ("." not in name or name.split(".")[1] in backends)
        ]
        sizes = Counter(point.group for point in points)
        share = np.array([1.0 / (sizes[point.group] * len(sizes)) for point in points])
        return cls(
            names=names,
            predictor=Predictor.of(points),
            measured_s=np.array([point.tpot_s for point in points] + [point.ttft_s for point in points]),
            weights=np.concatenate([share, share * TTFT_WEIGHT]),
            priors=np.log([table.constants[name].prior for name in names]),
            spreads=np.array([table.constants[name].spread for name in names]),
            fixed=table.values(),
        )

    def errors(self, logs: Vector) -> Vector:
        """Relative errors."""
        values = dict(zip(self.names, np.exp(logs).tolist(), strict=True))
        found = self.predictor.predict(Constants({**self.fixed, **values}))
        predicted_s = np.concatenate([np.asarray(found.tpot_s), np.asarray(found.ttft_s)])
        return np.minimum(predicted_s / self.measured_s - 1.0, LARGEST)

    def residuals(self, logs: Vector) -> tuple[Vector, Vector]:
        """Errors and distances from the priors, and the weight of the square of each."""
        errors = self.errors(logs)
        weights = self.weights / np.maximum(np.abs(errors), SMALLEST)
        distances = (logs - self.priors) / self.spreads
        return np.concatenate([errors, distances]), np.concatenate([weights, np.full(len(logs), PRIOR_WEIGHT)])

    def loss(self, logs: Vector) -> float:
        """What is made small."""
        errors = np.abs(self.errors(logs))
        data = np.where(errors < SMALLEST, (errors * errors / SMALLEST + SMALLEST) / 2.0, errors)
        prior = ((logs - self.priors) / self.spreads) ** 2
        return float(self.weights @ data + PRIOR_WEIGHT / 2.0 * prior.sum())


def _jacobian(problem: _Problem, at: Vector, value: Vector) -> NDArray[np.float64]:
    columns = []
    for index in range(len(at)):
        moved = at.copy()
        moved[index] += STEP
        columns.append((problem.residuals(moved)[0] - value) / STEP)
    return np.stack(columns, axis=1)


def _descend(
    problem: _Problem,
    logs: Vector,
    model: tuple[Vector, Vector, NDArray[np.float64]],
    bounds: tuple[Vector, Vector],
    loss: float,
    damping: float,
) -> tuple[bool, Vector, float, float]:
    """One step that lowers the loss, if there is one; more damping shortens it."""
    residuals, weights, jacobian = model
    normal = jacobian.T @ (weights[:, None] * jacobian)
    gradient = jacobian.T @ (weights * residuals)
    for _ in range(6):
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -gradient)
        moved = np.clip(logs + np.clip(step, -1.0, 1.0), *bounds)
        after = problem.loss(moved)
        if after < loss:
            return True, moved, after, max(damping / 4.0, 1e-4)
        damping *= 6.0
    return False, logs, loss, damping
