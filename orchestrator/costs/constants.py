"""The fitted constants of the cost model: one table, with bounds and provenance (`constants.yaml`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

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

    @model_validator(mode="after")
    def _is_within_its_bounds(self) -> Constant:
        if not self.low <= self.value <= self.high or not self.low <= self.prior <= self.high:
            raise ValueError(f"value {self.value} and prior {self.prior} must lie between {self.low} and {self.high}")
        return self


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


def refitted(table: ConstantTable, values: Mapping[str, float], provenance: str) -> ConstantTable:
    """The table with other values; priors, bounds and sources stay."""
    constants = {
        name: constant.model_copy(update={"value": float(values.get(name, constant.value))})
        for name, constant in table.constants.items()
    }
    return table.model_copy(update={"provenance": provenance, "constants": constants})


def dump(table: ConstantTable) -> str:
    """YAML that reads back as an equal table, values to five digits."""
    lines = [
        "# The constants of the cost model. `autan plan fit CSV --out FILE` writes such a table.",
        f"provenance: {json.dumps(table.provenance)}",
    ]
    lines.append("constants:")
    for name, one in table.constants.items():
        numbers = (("value", one.value), ("prior", one.prior), ("low", one.low), ("high", one.high), ("spread", one.spread))
        lines.append(f"  {name}:")
        lines.append("    " + "\n    ".join(f"{key}: {_number(number)}" for key, number in numbers))
        lines.append(f"    meaning: {json.dumps(one.meaning)}\n    source: {json.dumps(one.source)}")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """Five digits, in a form that YAML 1.2 reads as a float."""
    text = f"{value:.5g}"
    return text if any(mark in text for mark in ".e") else f"{text}.0"


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
