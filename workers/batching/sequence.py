"""One sequence inside an engine: its tokens, how far its KV is computed, its blocks, its stage."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto

from protos.contract.block_hash import next_hash
from workers.batching.constraint import Constraint
from workers.batching.runner import AllowedTokens
from workers.batching.token_counts import TokenCounts
from workers.engine_api.types import EngineRequest, FinishReason, Phase


class SequenceState(Enum):
    """Stages of a sequence."""

    WAITING = auto()  # no blocks; new, or preempted and to be recomputed
    RESTORING = auto()  # no blocks; leading ones are on their way from a lower tier into the prefix cache
    PREFILLING = auto()  # has blocks for all known tokens; rows are computed in chunks
    DECODING = auto()  # one known token without a row: the last one
    HELD = auto()  # prefilled for somebody else, or paused to be moved; keeps its blocks until the hand-off is over
    IMPORTING = auto()  # blocks reserved; their bytes arrive from another worker
    ENDED = auto()  # owns nothing


TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.PREFILLING, SequenceState.RESTORING, SequenceState.ENDED}),
    SequenceState.RESTORING: frozenset({SequenceState.WAITING, SequenceState.ENDED}),
    SequenceState.PREFILLING: frozenset(
        {SequenceState.DECODING, SequenceState.HELD, SequenceState.WAITING, SequenceState.ENDED}
    ),
    SequenceState.DECODING: frozenset({SequenceState.WAITING, SequenceState.HELD, SequenceState.ENDED}),
    SequenceState.HELD: frozenset({SequenceState.DECODING, SequenceState.ENDED}),
    SequenceState.IMPORTING: frozenset({SequenceState.DECODING, SequenceState.WAITING, SequenceState.ENDED}),
    SequenceState.ENDED: frozenset(),
}


class IllegalMove(AssertionError):
    """A stage does not follow from the present one: a bug of the caller."""


class Sequence:
    """Mutable state of one request in one engine, at one epoch.

    `tokens` is prompt + output, all that is known; rows `[0, num_computed)` of its KV are final. `order` is its age:
    smaller is older.
    """

    __slots__ = (
        "_counts", "_table", "block_tokens", "blocks", "cached_tokens", "chunks", "constraint", "epoch", "is_exact", "names",
        "num_computed", "num_filed", "num_prompt", "order", "preempted", "request", "request_id", "root", "sampling",
        "state", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request: EngineRequest,
        order: int,
        block_tokens: int,
        root: bytes,
        state: SequenceState,
        constraint: Constraint | None = None,
    ) -> None:
        self.request = request
        self.request_id = request.request_id
        self.epoch = request.epoch
        # A grammar keeps min_tokens in its masks as far as it can: an end that it lets through is one.
        self.sampling = request.sampling if constraint is None else replace(request.sampling, min_tokens=0)
        self.constraint = constraint
        self.order = order
        self.block_tokens = block_tokens
        self.root = root
        self.state = state
        self.tokens: list[int] = [*request.prompt, *request.output]
        self.num_prompt = len(request.prompt)
        self.num_computed = 0
        self.num_filed = 0  # leading blocks that came from the prefix cache or were offered to it
        self.is_exact = True  # rows came from here or are what would have come: others are never filed
        self.cached_tokens = 0
        self.chunks = 0
        self.preempted = False
        self.blocks: list[int] = []
        self.names: list[bytes] = []
        self._table: tuple[int, ...] = ()
        self._counts = TokenCounts(self.num_prompt) if request.sampling.has_penalties else None

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.epoch

    @property
    def output_index(self) -> int:
        """Index of the next output token."""
        return len(self.tokens) - self.num_prompt

    @property
    def is_paused(self) -> bool:
        """True when it is held to be moved, not as the result of a prefill for somebody else."""
        return self.state is SequenceState.HELD and self.request.phase is Phase.FULL

    @property
    def blocks_for_known(self) -> int:
        """Blocks that hold a row for every known token."""
        return -(-len(self.tokens) // self.block_tokens)

    @property
    def table(self) -> tuple[int, ...]:
        """The blocks in logical order; rebuilt only when blocks were added."""
        if len(self._table) != len(self.blocks):
            self._table = tuple(self.blocks)
        return self._table

    @property
    def counts(self) -> TokenCounts | None:
        """How often each known token occurs; None when no penalty asks for it. Counts what was added since the last call."""
        if self._counts is not None:
            self._counts.catch_up(self.tokens)
        return self._counts

    def foresee(self) -> AllowedTokens | None:
        """Begins to compute what the grammar allows after the known tokens, and tells how to wait for it; None without one."""
        return None if self.constraint is None else self.constraint.follow(self.tokens)

    def move(self, state: SequenceState) -> None:
        """Goes to another stage. Raises IllegalMove, and changes nothing, when the table has no such step."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalMove(f"{self.request_id} epoch {self.epoch}: {self.state.name} -> {state.name}")
        self.state = state

    def names_of(self, count: int) -> list[bytes]:
        """The names of the first `count` blocks, which known tokens must fill; computed once each."""
        names, size = self.names, self.block_tokens
        assert count * size <= len(self.tokens), f"{self.request_id}: block {count - 1} is not full"
        while len(names) < count:
            start = len(names) * size
            names.append(next_hash(names[-1] if names else self.root, self.tokens[start : start + size]))
        return names[:count]

    def imported(self, next_token_ids: tuple[int, ...], num_rows: int, exact: bool) -> None:
        """So many rows came from another engine, and the tokens that it sampled."""
        self.tokens += next_token_ids
        self.num_computed = num_rows
        self.is_exact = exact

    def take_blocks(self) -> list[int]:
        """Empties the block table and forgets all computed rows; the caller owns the references now."""
        blocks, self.blocks = self.blocks, []
        self._table = ()
        self.num_computed = 0
        self.is_exact = True
        return blocks

    def give_up_blocks(self, first: int) -> list[int]:
        """Takes the blocks from `first` on out of the table; the caller owns the references now."""
        blocks = self.blocks[first:]
        del self.blocks[first:]
        self._table = ()
        return blocks

    def append(self, token_id: int, context_tokens: int) -> FinishReason | None:
        """Adds a sampled token and tells whether it is the last one."""
        index = len(self.tokens) - self.num_prompt
        self.tokens.append(token_id)
        sampling = self.sampling
        if token_id in sampling.stop_token_ids and index >= sampling.min_tokens:
            return FinishReason.STOP
        if index + 1 >= sampling.max_tokens or len(self.tokens) >= context_tokens:
            return FinishReason.LENGTH
        return None
