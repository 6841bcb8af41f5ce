"""A leak of a kilobyte for each request is found in the noise of a real process, and none where there is none."""

from __future__ import annotations

import random
from itertools import combinations
from statistics import median

import pytest

from tests.chaos.soak_usage import Series, floors, slope_of, theil_sen

REQUESTS_PER_S = 15.0
SECONDS = 1800


def lived(leak_bytes_per_request: float, leaked_fds_per_minute: float = 0.0, seed: int = 1) -> Series:
    """Half an hour of a process: it warms up, garbage comes and goes, the allocator takes and keeps some megabytes at once."""
    rng, series, kept_mb = random.Random(seed), Series("worker"), 0.0
    for second in range(SECONDS):
        if rng.random() < 0.002:
            kept_mb += rng.uniform(-1.5, 1.5)
        warm_mb = 40.0 * (1 - 0.98**second)
        garbage_mb = rng.expovariate(1.0)
        leaked_mb = leak_bytes_per_request * REQUESTS_PER_S * second / 1e6
        fds = 30 + rng.randrange(6) + int(leaked_fds_per_minute * second / 60)
        series.add(float(second), (80.0 + warm_mb + kept_mb + garbage_mb + leaked_mb, fds))
    return series


@pytest.mark.parametrize("seed", range(5))
def test_a_leak_of_a_kilobyte_for_each_request_is_found(seed: int) -> None:
    slope = slope_of(lived(1024.0, seed=seed), REQUESTS_PER_S)
    assert slope is not None and not slope.is_flat
    assert 600 < slope.bytes_per_request < 1500


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_leak(seed: int) -> None:
    slope = slope_of(lived(0.0, seed=seed), REQUESTS_PER_S)
    assert slope is not None and slope.is_flat, slope


def test_leaked_descriptors_are_found() -> None:
    slope = slope_of(lived(0.0, leaked_fds_per_minute=3.0), REQUESTS_PER_S)
    assert slope is not None and not slope.is_flat
    assert 2.0 < slope.fds_per_minute < 4.0


def test_a_short_life_tells_nothing() -> None:
    short = Series("worker")
    for second in range(200):
        short.add(float(second), (100.0 + second, 30))
    assert slope_of(short, REQUESTS_PER_S) is None
    assert slope_of(Series("worker"), REQUESTS_PER_S) is None


def test_the_slope_is_the_median_of_all_pairs() -> None:
    rng = random.Random(3)
    for _ in range(20):
        points = [(float(rng.randrange(9)), rng.gauss(0.0, 1.0)) for _ in range(rng.randrange(5, 12))]
        pairs = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if a[0] != b[0]]
        assert theil_sen(points) == pytest.approx(median(pairs))
    for points in ([], [(1.0, 2.0)], [(1.0, 2.0), (1.0, 3.0)]):
        with pytest.raises(ValueError, match="two times"):
            theil_sen(points)


def test_floors_are_the_lowest_of_each_window() -> None:
    assert floors([(0.0, 5.0), (9.0, 3.0), (10.0, 9.0), (31.0, 1.0)], 10.0) == [(5.0, 3.0), (15.0, 9.0), (35.0, 1.0)]
