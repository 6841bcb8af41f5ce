"""What one rank of an instance knows of the others: its share of a weight, and the sums over all ranks."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from protos.contract.errors import ModelError


class Ranks(Protocol):
    """The ranks of one instance. Every rank calls the collectives in the same order."""

    @property
    def rank(self) -> int:
        """This one, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """The elementwise sum of all ranks' `x`, the same bits on every rank. May overwrite `x`."""
        ...

    def join_columns(self, x: Tensor) -> Tensor:
        """All ranks' `[T, C]` side by side, `[T, size * C]`, in the order of ranks."""
        ...


class SoloRanks:
    """One rank: nothing to exchange."""

    rank = 0
    size = 1

    def sum(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def join_columns(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


SOLO = SoloRanks()


def share(total: int, ranks: Ranks, what: str, *, each: int = 1) -> slice:
    """This rank's run of `total` equal things of `each` rows. Raises ModelError when they cannot be shared equally."""
    if total % ranks.size:
        raise ModelError(f"{what}: {total} cannot be shared by {ranks.size} ranks; choose a number of ranks that divides it")
    count = total // ranks.size
    return slice(ranks.rank * count * each, (ranks.rank + 1) * count * each)
