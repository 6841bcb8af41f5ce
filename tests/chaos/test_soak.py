"""Random requests under random faults: right tokens or a clear error, one end each, nothing left behind.

A failure prints its seed; AUTAN_SOAK_SEED repeats that schedule. AUTAN_SOAK_MINUTES sets how long the long one takes.
"""

from __future__ import annotations

import json
import os
import random

import pytest

from tests.chaos.soak import Soak
from tests.support.cluster import run

SHORT_S = 25.0
LONG_S = 60.0 * float(os.environ.get("AUTAN_SOAK_MINUTES", "30"))
AFTER_S = 200.0  # for the last requests, the checks and the end of the cluster


def _seed(default: int) -> int:
    return int(os.environ.get("AUTAN_SOAK_SEED", default))


def _soak(seed: int, duration_s: float, *, slopes: bool = False) -> None:
    soak = Soak(seed, duration_s, slopes)
    try:
        run(soak.run(), duration_s + AFTER_S)
    finally:
        print(f"soak seed {seed}: {json.dumps(soak.report, indent=2)}")


@pytest.mark.slow
@pytest.mark.timeout(SHORT_S + AFTER_S + 10)
def test_random_load_and_faults_for_a_short_time() -> None:
    _soak(_seed(1), SHORT_S)


@pytest.mark.soak
@pytest.mark.timeout(LONG_S + AFTER_S + 10)
def test_random_load_and_faults_for_a_long_time() -> None:
    _soak(_seed(random.SystemRandom().randrange(1 << 31)), LONG_S, slopes=True)
