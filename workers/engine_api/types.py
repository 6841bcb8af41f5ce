"""Values that cross the engine's boundary. All frozen; token ids are plain ints; times are seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from protos.contract.grammar import Grammar


class Phase(StrEnum):
    """How far an engine takes a request."""

    PREFILL = "prefill"  # compute the prompt, sample one token, keep the KV until `release`
    FULL = "full"  # prefill and decode here


class FinishReason(StrEnum):
    """Why an engine ended a sequence."""

    STOP = "stop"  # eos or a stop token
    LENGTH = "length"  # max_tokens, or the context is full


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Equal params, seed and logits give the same token in every batch on every worker."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # eos included unless it is ignored
    repetition_penalty: float = 1.0  # over prompt and output: a positive logit is divided by it, a negative one multiplied
    presence_penalty: float = 0.0  # subtracted once from every token of the output
    frequency_penalty: float = 0.0  # subtracted as often as the token is in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit), by id, each id once
    grammar: Grammar | None = None  # of the whole output; the prompt is free. It has precedence over min_tokens
    logprobs: int | None = None  # alternatives to report with each token, 0 = only its own; None = no logprobs

    @property
    def has_penalties(self) -> bool:
        """True when the tokens so far change the next one beyond their KV."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_logits(self) -> bool:
        """True when only an engine with real logits can honour it."""
        return self.has_penalties or bool(self.logit_bias) or self.logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One sequence to run.

    `output` holds the tokens that were accepted already, when the request continues after the loss of a worker:
    the engine prefills `prompt + output` and samples the token of output index `len(output)` next.
    """

    request_id: str
    epoch: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    phase: Phase = Phase.FULL
    output: tuple[int, ...] = ()
    cache_salt: bytes = b""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities: log_softmax of the raw logits, before masks, bias, penalties,
    temperature and filters. `top_ids` fall by logprob, equal ones rise by id."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOut:
    """One sampled token. `index` counts output tokens from 0 over the whole life of the request."""

    request_id: str
    epoch: int
    index: int
    token_id: int
    finish: FinishReason | None = None
    logprobs: TokenLogprobs | None = None  # when the request asks for them


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """`computed_tokens` KV rows of the sequence are final (prefix hits included); the blocks that they fill may be exported."""

    request_id: str
    epoch: int
    computed_tokens: int
    total_tokens: int
    cached_tokens: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Paused:
    """A sequence that decodes no more until it is resumed: `num_tokens` KV rows are final, in pinned `block_ids`.

    `output` is all of it; its last token has no row yet.
    """

    output: tuple[int, ...]
    num_tokens: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """Told during a step: of the rows below `computed_tokens` the first `groups` layer groups are final, and may be exported.

    `computed_tokens` is what PrefillProgress says of the whole step when it is over; rows of earlier steps are final in
    all groups. When it equals `total_tokens` this holds for the rows of a partly filled last block too.
    """

    request_id: str
    epoch: int
    computed_tokens: int
    total_tokens: int
    groups: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine gave up on one sequence and freed what it held; its batch mates are unaffected.

    `blame` is set when the request itself is at fault: it would fail everywhere.
    """

    request_id: str
    epoch: int
    message: str
    blame: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one engine step did, in the order tokens, progress, failures. An empty result means there was nothing to run."""

    tokens: tuple[TokenOut, ...] = ()
    progress: tuple[PrefillProgress, ...] = ()
    failed: tuple[Failed, ...] = ()
    batch_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """How KV rows lie in a block: bytes are `[num_layers, block_tokens, row_bytes]`, C order, little endian.

    A layer group is `layers_per_group` consecutive layers of one block (the last group may be shorter): the unit
    that is digested and pushed. What follows from the fields is computed once: hand-offs ask for every part they move.
    """

    block_tokens: int
    num_layers: int
    row_bytes: int
    dtype: str
    name: str  # "gqa:k+v", "mla:latent+rope", "oracle"
    target_group_bytes: int = 512 * 1024

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.block_tokens * self.row_bytes

    @cached_property
    def layers_per_group(self) -> int:
        """As many layers as fit `target_group_bytes`, at least one."""
        layer_bytes = self.block_tokens * self.row_bytes
        return max(1, min(self.num_layers, self.target_group_bytes // layer_bytes))

    @cached_property
    def num_groups(self) -> int:
        """Layer groups of one block."""
        return -(-self.num_layers // self.layers_per_group)

    def group_bytes(self, group: int) -> int:
        """Bytes of one layer group. Raises IndexError outside `0 <= group < num_groups`."""
        if not 0 <= group < self.num_groups:
            raise IndexError(f"layer group {group} of {self.num_groups}")
        return self._group_bytes[group]

    @cached_property
    def _group_bytes(self) -> tuple[int, ...]:
        layer_bytes, per_group = self.block_tokens * self.row_bytes, self.layers_per_group
        layers = (min(per_group, self.num_layers - first) for first in range(0, self.num_layers, per_group))
        return tuple(count * layer_bytes for count in layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What must be equal on both sides of a hand-off, besides the layout, and what a front end needs to validate a request."""

    model: str
    architecture: str
    weights_digest: str
    tokenizer_digest: str
    vocab_size: int  # logits width
    context_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    has_logits: bool = True  # False: penalties, logit_bias and logprobs are refused
    template_digest: str = ""  # of the chat template; empty without one


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportTicket:
    """Blocks reserved for a sequence that arrives from another worker.

    The first `reused_blocks` come from the prefix cache and hold final bytes; all later ones must be written.
    """

    request_id: str
    epoch: int
    block_ids: tuple[int, ...]
    reused_blocks: int


class KvPlace(NamedTuple):
    """A run of bytes inside one layer group of a block."""

    block_id: int
    group: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixTicket:
    """Blocks by content that leave the prefix cache or enter it; see Engine.export_prefix and Engine.import_prefix_begin.

    `block_ids[i]` belongs to name `first_block + i` of those that were given.
    """

    ticket_id: int
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters and gauges of one engine, since its start."""

    total_blocks: int = 0
    used_blocks: int = 0  # referenced
    cached_blocks: int = 0  # unreferenced, kept for their prefix
    host_blocks: int = 0  # kept in the host's memory
    host_bytes: int = 0
    disk_blocks: int = 0
    disk_bytes: int = 0
    known_names: int = 0  # full blocks by content that the pool or a tier below has
    free_blocks: int = 0
    waiting: int = 0
    restoring: int = 0  # of the waiting ones: blocks are on their way from lower tiers
    running: int = 0
    holding: int = 0  # prefilled, KV kept until `release`
    importing: int = 0
    steps: int = 0
    prefill_chunks: int = 0
    prefill_tokens: int = 0
    prefix_hit_tokens: int = 0
    host_restored_tokens: int = 0  # brought back from the host's memory
    disk_restored_tokens: int = 0  # brought back from the disk
    corrupt_blocks: int = 0  # of the disk: did not verify, were dropped and computed again
    tier_errors: int = 0  # of the disk
    tier_off_reason: str = ""  # why nothing is written to the disk at present; empty when it works, or there is none
    decode_tokens: int = 0
    preemptions: int = 0
    leaked_blocks: int = 0  # referenced blocks that no sequence owns; 0 or a bug
    expert_visits: tuple[int, ...] = ()  # rows that each routed expert was chosen for, over all layers


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskAudit:
    """Blocks of the disk that were read and verified; `corrupt` are the names of those that were not what they should be."""

    checked: int = 0
    corrupt: tuple[bytes, ...] = ()
    error: str = ""  # of the disk; empty when it works, or there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOwner:
    """Somebody who refers to KV blocks of an engine. `kind`: "request" for a sequence, "transfer" for a pin.

    `stage` is that of the sequence (`waiting`, `restoring`, `prefilling`, `decoding`, `held`, `importing`), or `pinned`.
    """

    kind: str
    request_id: str
    epoch: int
    stage: str
    blocks: int


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """A change of the prefix cache, numbered without gaps from 1: the index of a router can tell that it missed one.

    A name is stored when the pool or a lower tier of this worker gets it first, and removed when the last of them loses it.
    """

    sequence: int
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    parent: bytes = b""
    tags: dict[str, str] = field(default_factory=dict)
