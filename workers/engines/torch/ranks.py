"""What one rank of an instance knows of the others: its share of a weight, and the sums over all ranks."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class RankOf:
    """Which rank of how many: enough to know a share."""

    rank: int
    size: int


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


def share(total: int, ranks: RankOf | Ranks, what: str, *, each: int = 1) -> slice:
    """This rank's run of `total` equal things of `each` rows. Raises ModelError when they cannot be shared equally."""
    if total % ranks.size:
        raise ModelError(f"{what}: {total} cannot be shared by {ranks.size} ranks; choose a number of ranks that divides it")
    count = total // ranks.size
    return slice(ranks.rank * count * each, (ranks.rank + 1) * count * each)


def kv_head_share(num_kv_heads: int, ranks: RankOf | Ranks) -> slice:
    """The KV heads that this rank's query heads attend to; with fewer KV heads than ranks several ranks hold the same one.

    Raises ModelError when neither number divides the other.
    """
    if ranks.size > num_kv_heads and ranks.size % num_kv_heads == 0:
        head = ranks.rank // (ranks.size // num_kv_heads)
        return slice(head, head + 1)
    return share(num_kv_heads, ranks, "num_key_value_heads")
