"""What lower tiers keep, write and bring back. Pure: numbers in, decisions out.

Value of a block. Rows at position `p` cost `a + b * p` seconds each (projections, and attention over what is before them),
so block `d` of `n` tokens saves `c(d) = n * (a + b * n * (d + 1/2))`; `a` and `b` are fitted to the engine's own steps. All
blocks are of one size, so value per byte is value per block.

What stays. GreedyDual-Size-Frequency (Cao and Irani 1997; Cherkasova 1998) over equal sizes: a block's rank when it is used
is `L + min(f, 3) * c(d) / c(0)`. `f` counts the prompts that used it, and is remembered for a while after the block left
(the ghost queue of S3-FIFO, Yang et al. 2023), so that prompts which come once do not push out what is used again and again.
`L` is the rank of the last block that went: what is not used any more ages. Only a block that no kept block builds on may
go: a name is worth nothing without its ancestors.

What is written to a slow tier. `p * (c(d) - read) > write`, with `p` the measured share of written blocks of this kind (seen
once, or more often) that were read again. What is slower to read than to compute is never written.

What is read. The leading run that saves most: the largest sum of `c(d) - read` over its blocks; none if that is negative.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence

MAX_FREQUENCY = 3
GHOSTS_PER_BLOCK = 2
READ_ALWAYS_S = 0.005
"""A wait so short is never weighed: predictions are not that exact."""

_FORGET = 0.98  # weight of what was known before, at each new observation
_MAX_OUTCOMES = 1024.0


class PrefillCost:
    """Fits `seconds = a * rows + b * rows * position` to prefill steps; recent ones count more."""

    def __init__(self) -> None:
        self._xx = self._xy = self._yy = self._xt = self._yt = 0.0
        self.known = False

    def observe(self, rows: int, row_positions: float, took_s: float) -> None:
        """A step computed so many prompt rows, whose positions add up to `row_positions`; without a duration it is no news."""
        if rows < 1 or took_s <= 0:
            return
        x, y = float(rows), row_positions
        self._xx, self._xy = _FORGET * self._xx + x * x, _FORGET * self._xy + x * y
        self._yy, self._xt = _FORGET * self._yy + y * y, _FORGET * self._xt + x * took_s
        self._yt = _FORGET * self._yt + y * took_s
        self.known = True

    def coefficients(self) -> tuple[float, float]:
        """`a` and `b`, neither negative."""
        determinant = self._xx * self._yy - self._xy * self._xy
        if determinant > 1e-9 * self._xx * self._yy:
            a = (self._xt * self._yy - self._yt * self._xy) / determinant
            b = (self._yt * self._xx - self._xt * self._xy) / determinant
            if a > 0 and b >= 0:
                return a, b
        return (self._xt / self._xx if self._xx else 0.0), 0.0

    def block_s(self, depth: int, block_tokens: int) -> float:
        """What computing block `depth` of a prompt takes; infinite while nothing was observed."""
        if not self.known:
            return float("inf")
        a, b = self.coefficients()
        return block_tokens * (a + b * block_tokens * (depth + 0.5))

    def relative(self, depth: int, block_tokens: int) -> float:
        """`c(depth) / c(0)`, 1 while nothing was observed."""
        if not self.known:
            return 1.0
        return self.block_s(depth, block_tokens) / self.block_s(0, block_tokens)


class Pace:
    """Seconds for one block, as a moving average that starts from a guess."""

    def __init__(self, guess_s: float) -> None:
        self.block_s = guess_s

    def observe(self, blocks: int, took_s: float) -> None:
        """So many blocks took so long together. No time at all is no news, and one slow turn is not the pace of the device."""
        if blocks > 0 and took_s > 0:
            self.block_s += 0.2 * (min(took_s / blocks, 4 * self.block_s) - self.block_s)


class ReuseRate:
    """How often written blocks are read again, apart for those that one prompt used and those that several did.

    Only what became of a block counts: read, or gone without. One that still lies there says nothing yet.
    """

    def __init__(self) -> None:
        self._ended = [1.0, 1.0]
        self._read = [1.0, 1.0]

    def ended(self, frequency: int, *, read: bool) -> None:
        """A block that had this frequency when it was written was read for the first time since, or left unread."""
        kind = int(frequency > 1)
        self._ended[kind] += 1
        self._read[kind] += read
        if self._ended[kind] > _MAX_OUTCOMES:
            self._ended[kind] /= 2
            self._read[kind] /= 2

    def of(self, frequency: int) -> float:
        """The share that is read again; 1 before anything is known, never 0."""
        kind = int(frequency > 1)
        return self._read[kind] / self._ended[kind]


def worth_writing(reuse: float, compute_s: float, read_s: float, write_s: float) -> bool:
    """Whether a block should be written to a tier."""
    return compute_s > read_s and (compute_s == float("inf") or reuse * (compute_s - read_s) > write_s)


def worth_reading(compute_s: Sequence[float], read_s: Sequence[float], queued_s: float) -> int:
    """How many leading blocks to read rather than to compute, when reading starts after `queued_s`."""
    best, best_saving, saving, reading = 0, 0.0, -queued_s, queued_s
    for index, (compute, read) in enumerate(zip(compute_s, read_s, strict=True)):
        saving += compute - read
        reading += read
        if saving >= best_saving or reading <= READ_ALWAYS_S:
            best, best_saving = index + 1, max(saving, best_saving)
    return best


class Retention:
    """The order in which the blocks of one tier go. `weight(depth)` is `c(depth) / c(0)`."""

    def __init__(self, capacity: int, weight: Callable[[int], float]) -> None:
        self._weight = weight
        self._max_ghosts = GHOSTS_PER_BLOCK * capacity
        self._rank: dict[bytes, float] = {}
        self._place: dict[bytes, tuple[bytes, int]] = {}  # parent, depth
        self._frequency: dict[bytes, int] = {}
        self._children: dict[bytes, int] = {}  # kept blocks that build on a name, kept or not
        self._ghosts: OrderedDict[bytes, int] = OrderedDict()
        self._heap: list[tuple[float, int, int, bytes]] = []
        self._floor = 0.0
        self._turn = 0

    def __contains__(self, name: bytes) -> bool:
        return name in self._rank

    def __len__(self) -> int:
        return len(self._rank)

    def frequency(self, name: bytes) -> int:
        """How many prompts are known to have used it."""
        return self._frequency.get(name) or self._ghosts.get(name, 0)

    def place(self, name: bytes) -> tuple[bytes, int]:
        """The parent and the depth of a kept name."""
        return self._place[name]

    def add(self, name: bytes, parent: bytes, depth: int, uses: int = 1) -> None:
        """The tier keeps a new name, which so many prompts used since it was last known here."""
        assert name not in self._rank, f"{name.hex()} is kept already"
        self._frequency[name] = self._ghosts.pop(name, 0) + uses
        self._place[name] = (parent, depth)
        self._children[parent] = self._children.get(parent, 0) + 1
        self._use(name)

    def touch(self, name: bytes) -> None:
        """A prompt uses a kept name."""
        self._frequency[name] += 1
        self._use(name)

    def remove(self, name: bytes) -> None:
        """The tier does not keep the name any more; how often it was used is remembered for a while."""
        parent, _ = self._place.pop(name)
        del self._rank[name]
        self._ghosts[name] = self._frequency.pop(name)
        while len(self._ghosts) > self._max_ghosts:
            self._ghosts.popitem(last=False)
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._children[parent]
            if parent in self._rank:
                self._push(parent)

    def victim(self, is_busy: Callable[[bytes], bool]) -> bytes | None:
        """The name that should go next, None when every leaf is busy. It stays until `remove`."""
        passed: list[tuple[float, int, int, bytes]] = []
        found = None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            rank, _, _, name = entry
            if self._rank.get(name) != rank or name in self._children:
                continue
            passed.append(entry)
            if not is_busy(name):
                found = name
                self._floor = max(self._floor, rank)
        for entry in passed:
            heapq.heappush(self._heap, entry)
        return found

    def check_integrity(self) -> None:
        """Raises AssertionError when a kept leaf could never go, or counts of children are wrong."""
        children: dict[bytes, int] = {}
        for parent, _ in self._place.values():
            children[parent] = children.get(parent, 0) + 1
        assert children == self._children, "children and their counts differ"
        assert self._rank.keys() == self._place.keys() == self._frequency.keys(), "kept names differ"
        queued = {(name, rank) for rank, _, _, name in self._heap}
        for name, rank in self._rank.items():
            assert name in children or (name, rank) in queued, f"{name.hex()} can never go"

    def _use(self, name: bytes) -> None:
        weight = self._weight(self._place[name][1])
        self._rank[name] = self._floor + min(self._frequency[name], MAX_FREQUENCY) * weight
        if name not in self._children:
            self._push(name)

    def _push(self, name: bytes) -> None:
        self._turn += 1
        heapq.heappush(self._heap, (self._rank[name], -self._place[name][1], self._turn, name))
        if len(self._heap) > 64 + 4 * len(self._rank):
            live = {n: e for e in self._heap if self._rank.get(n := e[3]) == e[0] and n not in self._children}
            self._heap = list(live.values())
            heapq.heapify(self._heap)
