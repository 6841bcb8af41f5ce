"""The fitted constants of the cost model: one table, with bounds and provenance (`constants.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field

from configs.catalog.loader import read_description
from configs.schema.base import Line, Section

_TABLE = Path(__file__).resolve().parent / "constants.yaml"
Bounded = Annotated[float, Field(allow_inf_nan=False)]


class Constant(Section):
    """One constant: its value, the bounds that physics gives it, and what it is expected to be before any measurement."""

    value: Bounded
    prior: Bounded
    low: Bounded
    high: Bounded
    spread: Annotated[float, Field(gt=0)]  # of the prior: relative, one standard deviation
    meaning: Line
    source: Line


class ConstantTable(Section):
    """All constants by name. Those named `NAME.BACKEND` hold for one serving engine."""

    provenance: Line
    constants: dict[str, Constant]

    def values(self) -> dict[str, float]:
        """Name to value."""
        return {name: constant.value for name, constant in self.constants.items()}


@cache
def shipped_table() -> ConstantTable:
    """The table that comes with Autan."""
    return read_description(_TABLE, ConstantTable)


@dataclass(frozen=True, slots=True)
class Constants:
    """Values to compute with: by name, and per engine."""

    values: Mapping[str, float] = field(default_factory=lambda: shipped_table().values())

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def of_backend(self, name: str, backend: str) -> float:
        """The value for an engine; an unknown one counts as `DEFAULT_BACKEND`."""
        found = self.values.get(f"{name}.{backend}")
        return self.values[f"{name}.{DEFAULT_BACKEND}"] if found is None else found

    def of_backends(self, name: str, backends: Sequence[str]) -> list[float]:
        """As of_backend, for a list."""
        return [self.of_backend(name, backend) for backend in backends]


DEFAULT_BACKEND = "vllm"
