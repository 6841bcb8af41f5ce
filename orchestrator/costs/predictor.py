"""Predictions for many measured points at once: shapes are built once, constants vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from orchestrator.costs.constants import Constants
from orchestrator.costs.memory import places
from orchestrator.costs.points import MeasuredPoint, Role
from orchestrator.costs.serving_point import ClosedLoop, Pool, ServingPoint, predict
from orchestrator.costs.shape import RankShape, shape_of, stacked
from orchestrator.costs.step import EngineCosts

CHUNK_TOKENS = 8192.0  # what engines compute of prompts in one step by default on these GPUs
HELD_OUTPUT = 0.65  # share of the answer that a running request holds cache for, on average, when caches are full


@dataclass(frozen=True)
class Predictor:
    """The points' fixed facts as arrays."""

    points: Sequence[MeasuredPoint]
    prefill: Pool
    decode: Pool
    split: NDArray[np.float64]
    prompt_tokens: NDArray[np.float64]
    output_tokens: NDArray[np.float64]
    concurrency: NDArray[np.float64]
    spread: NDArray[np.float64]

    @classmethod
    def of(cls, points: Sequence[MeasuredPoint]) -> Predictor:
        """Builds the shapes."""
        shapes: dict[tuple[str, str, Role], RankShape] = {}
        return cls(
            points=points,
            prefill=_pool(points, [point.prefill for point in points], shapes),
            decode=_pool(points, [point.decode for point in points], shapes),
            split=_array([point.split for point in points]),
            prompt_tokens=_array([point.prompt_tokens for point in points]),
            output_tokens=_array([point.output_tokens for point in points]),
            concurrency=_array([point.concurrency for point in points]),
            spread=_array([point.spread for point in points]),
        )

    def predict(self, constants: Constants) -> ServingPoint:
        """The points' means, as arrays in their order."""
        backends = [point.backend for point in self.points]

        def per(name: str) -> NDArray[np.float64]:
            return _array(constants.of_backends(name, backends))

        loop = ClosedLoop(
            prefill=self.prefill,
            decode=self.decode,
            split=self.split,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            concurrency=self.concurrency,
            chunk_tokens=CHUNK_TOKENS,
            spread=self.spread,
            sequence_limit=per("sequence_limit"),
            engine=EngineCosts(**{field.name: per(f"engine_{field.name}") for field in fields(EngineCosts)}),
            first_token_s=per("first_token_s"),
            first_wave=per("first_wave"),
            handoff_s=constants["handoff_s"],
        )
        return predict(loop, constants)


def _pool(points: Sequence[MeasuredPoint], roles: Sequence[Role], shapes: dict[tuple[str, str, Role], RankShape]) -> Pool:
    found = []
    held = []
    for point, role in zip(points, roles, strict=True):
        key = (point.model.name, point.gpu.name, role)
        if key not in shapes:
            shapes[key] = shape_of(point.model, role.layout, point.gpu)
        found.append(shapes[key])
        tokens = round(point.prompt_tokens + HELD_OUTPUT * point.output_tokens)
        held.append(max(1.0, places(point.model, role.layout, shapes[key], point.gpu, tokens)))
    return Pool(shape=stacked(found), instances=_array([role.instances for role in roles]), places=_array(held))


def _array(values: Sequence[float]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)
