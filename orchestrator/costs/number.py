"""Numbers of the cost model: a float, or an array with one entry for each of many cases that are computed at once.

Everything in this package that takes a `Number` works element by element, so one code predicts a single step for the
scheduler and a thousand of them for a fit.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Number: TypeAlias = float | NDArray[np.float64]


def larger(a: Number, b: Number) -> Number:
    """The larger of the two."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.maximum(a, b)
    return max(a, b)


def smaller(a: Number, b: Number) -> Number:
    """The smaller of the two."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.minimum(a, b)
    return min(a, b)


def largest(value: Number) -> float:
    """The largest entry."""
    return float(np.max(value))


def as_number(value: Any) -> Number:
    """An array of floats, or a float."""
    return np.asarray(value, dtype=np.float64) if np.ndim(value) else float(value)
