"""What differs between the engines that share the batcher: computing, and the bytes of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.batching.token_counts import TokenCounts
from workers.engine_api.types import KvLayout, ModelIdentity, SamplingParams, TokenLogprobs

AllowedTokens = Callable[[], memoryview | None]
"""The tokens that a grammar allows next: `ceil(vocabulary / 32)` int32 words, token `t` at bit `t % 32` of word `t // 32`.

Called once by each step that samples, after the forward pass was started, so that the words may be computed meanwhile; the
view is read before `run` returns. None allows every token. An AutanError that it raises fails its sequence alone.
"""


OnGroups = Callable[[int], None]
"""Hears, on the thread of `run`, that all rows of the batch are final in so many leading layer groups; the number rises."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The rows of one sequence that one step computes.

    `tokens[start : start + count]` are fed; KV rows `[0, start)` are final in the blocks of `block_table`
    (logical order), rows `[start, start + count)` get written. When `sample` is set the slice ends at the last known
    token and one token of output index `output_index` is drawn after it.
    """

    request_id: str
    tokens: Sequence[int]  # prompt + output, all known tokens
    num_prompt_tokens: int
    start: int
    count: int
    block_table: tuple[int, ...]
    sampling: SamplingParams
    sample: bool
    output_index: int
    cache_salt: bytes = b""
    allowed: AllowedTokens | None = None  # applied before everything else; None: no grammar
    counts: TokenCounts | None = None  # of `tokens`, when penalties need them; None: the runner counts for itself


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome for one slice: a token when it was asked for, or the reason why this sequence failed."""

    token_id: int | None
    error: str | None = None
    logprobs: TokenLogprobs | None = None


class Runner(Protocol):
    """Computes batches over a paged pool that it owns."""

    @property
    def identity(self) -> ModelIdentity: ...

    @property
    def layout(self) -> KvLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def run(self, batch: Sequence[Slice], on_groups: OnGroups | None = None) -> list[Sampled]:
        """One forward pass; the result has the order of the batch. Raises only when the device itself is lost.

        `on_groups` is told of layer groups as they become final, by runners that know; the others never call it.
        """
        ...

    def expert_visits(self) -> tuple[int, ...]:
        """Rows that each routed expert was chosen for since the start, over all layers; empty without experts. Any thread."""
        ...

    def read_block(self, block_id: int, group: int) -> memoryview:
        """The bytes of one layer group; see Engine.export_kv."""
        ...

    def write_block(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        """Writes bytes into one layer group; see Engine.import_kv."""
        ...

    def writable_group(self, block_id: int, group: int) -> memoryview | None:
        """The bytes of one layer group where they lie, to be written; None where this process cannot look into the pool."""
        ...

    def close(self) -> None: ...
