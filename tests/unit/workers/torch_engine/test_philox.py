from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from workers.engines.torch.philox import GROUP_NOISE, gumbel_of, gumbel_run, philox
from workers.engines.torch.sampler_reference import gumbel
from workers.engines.torch.sampler_reference import philox as slow_philox

ONES = 2**32 - 1
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
# The known-answer tests of Random123 for philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def words(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c, k = [torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key]
    return tuple(int(word) for word in philox((c[0], c[1], c[2], c[3]), (k[0], k[1])))


def tensors(seed: int, index: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    return (torch.tensor([[seed % 2**32]]), torch.tensor([[seed >> 32]])), torch.tensor([[index]])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_published_vectors(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert words(counter, key) == expected
    assert slow_philox(counter, key) == expected  # type: ignore[arg-type]


def test_words_equal_the_slow_twin() -> None:
    chance = random.Random(3)
    for _ in range(200):
        counter = tuple(chance.getrandbits(32) for _ in range(4))
        key = tuple(chance.getrandbits(32) for _ in range(2))
        assert words(counter, key) == slow_philox(counter, key)  # type: ignore[arg-type]


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (7, 3), (2**64 - 1, 2**31), (2**53 + 5, 262_143)])
def test_noise_equals_the_slow_twin(seed: int, index: int) -> None:
    key, position = tensors(seed, index)
    run = gumbel_run(torch.tensor([[8]]), 30, key, position)
    assert run[0].tolist() == pytest.approx([gumbel(seed, index, i) for i in range(8, 38)], rel=1e-12)
    ids = torch.tensor([[5, 131_071, 0, 2, 8]])
    assert gumbel_of(ids, key, position)[0].tolist() == pytest.approx(
        [gumbel(seed, index, i) for i in ids[0].tolist()], rel=1e-12
    )
    groups = gumbel_run(torch.tensor([[0]]), 5, key, position, GROUP_NOISE)
    assert groups[0].tolist() == pytest.approx([gumbel(seed, index, i, kind=1) for i in range(5)], rel=1e-12)


def test_noise_is_named_by_seed_and_index() -> None:
    noise = [gumbel_run(torch.tensor([[0]]), 4000, *tensors(*name)) for name in ((7, 3), (8, 3), (7, 4), (7 + 2**32, 3))]
    assert len(np.unique(torch.stack(noise).numpy())) > 15_990  # 32-bit words seldom meet
    assert all(torch.isfinite(one).all() for one in noise)
    assert float(noise[0].mean()) == pytest.approx(0.5772, abs=0.08)
    assert float(noise[0].var()) == pytest.approx(1.645, abs=0.2)


def test_the_noise_never_changes() -> None:
    """A running request may move to a worker of a later release: these numbers are part of the contract."""
    assert gumbel_run(torch.tensor([[0]]), 3, *tensors(42, 1))[0].tolist() == pytest.approx(PINNED_NOISE, rel=1e-12)


PINNED_NOISE = [-1.525904759577272, -0.7273033427085118, -0.37893818835300686]
