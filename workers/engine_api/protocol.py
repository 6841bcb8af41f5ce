"""What every engine promises. Three implementations pass one contract suite: oracle, torch, vllm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from workers.engine_api.types import (
    BlockOwner,
    CacheEvent,
    DiskAudit,
    EngineRequest,
    EngineStats,
    ImportTicket,
    KvLayout,
    KvPlace,
    LayerProgress,
    ModelIdentity,
    Paused,
    PrefixTicket,
    StepResult,
)

OnLayers = Callable[[tuple[LayerProgress, ...]], None]


class KvRoom(Protocol):
    """Places in the pool that bytes may be written into from any thread, but only inside of `write`."""

    @property
    def views(self) -> Sequence[memoryview]:
        """One for each place, in order, writable."""
        ...

    def write(self, fill: Callable[[], int]) -> int:
        """Runs `fill` and gives its result while all the blocks belong to open imports. Raises BadFrame, and runs nothing, when
        one does not any more: what is in it then is somebody else's."""
        ...


@runtime_checkable
class Engine(Protocol):
    """One model on one device group.

    Threads: everything but `export_kv`, `import_kv` and `import_room` is called from one thread, the engine's. Those may be
    called from any thread at the same time as a step: they touch only blocks whose bytes no step changes.

    Blocks: a block that a sequence refers to is never reused. Every sequence gives its blocks back exactly once: on its
    finish (Phase.FULL), on `release` (Phase.PREFILL and failed imports) or on `abort`. Full blocks then stay in the prefix
    cache until the pool needs them.
    """

    @property
    def identity(self) -> ModelIdentity:
        """The model; constant."""
        ...

    @property
    def layout(self) -> KvLayout:
        """How KV bytes lie in a block; constant."""
        ...

    def add(self, request: EngineRequest) -> None:
        """Queues a sequence. An older epoch of the same request is aborted first.

        Raises StaleEpoch when a newer or the same epoch is here, OutOfBlocks when the pool could never hold it (even empty),
        InvalidRequest for a token id outside the vocabulary or an empty prompt.
        """
        ...

    def step(self, on_layers: OnLayers | None = None) -> StepResult:
        """Runs one batch: chunks of waiting prompts and one token for each running sequence, under the token budget.

        Never raises for the sake of one sequence (see StepResult.failed). Returns an empty result when nothing can run.
        A Phase.PREFILL sequence that sampled its token (reported with finish=None unless that token ends the request)
        is held, and no longer runs, until `release` or `abort`.

        `on_layers` hears, on this thread while the step computes, how far the Phase.PREFILL chunks of the batch are; `pin`
        may be called from it and nothing else. An engine may never call it, but not before the layers are final.
        """
        ...

    def has_work(self) -> bool:
        """True when a step would run something."""
        ...

    def on_wake(self, wake: Callable[[], None]) -> None:
        """From now on `wake` is called, from any thread, whenever `has_work` may have become true by itself: blocks of a
        waiting prompt came back from a lower tier."""
        ...

    def idle_limit_s(self) -> float | None:
        """How long who waits for `wake` should wait at most before it asks `has_work` again; None: for good."""
        ...

    def abort(self, request_id: str, up_to_epoch: int) -> bool:
        """Drops the sequence if its epoch is at most `up_to_epoch`, in whatever stage; False when there is none. Idempotent.

        Blocks that an export or import still touches are kept until `unpin`.
        """
        ...

    def release(self, request_id: str, epoch: int) -> bool:
        """Ends the holding of a prefilled sequence after its hand-off; False when nothing of that epoch is held. Idempotent."""
        ...

    def pin(self, request_id: str, epoch: int) -> tuple[int, ...]:
        """Takes a second reference on all blocks of the sequence for a transfer and returns their ids in logical order.

        The bytes stay valid until `unpin`, even if the sequence ends. Raises StaleEpoch when the sequence is not here.
        Call it again as the sequence grows: ids that are pinned already are not counted twice.
        """
        ...

    def unpin(self, request_id: str, epoch: int) -> None:
        """Gives back the references of `pin`. Idempotent."""
        ...

    def pause(self, request_id: str, epoch: int) -> Paused | None:
        """Stops a decoding sequence, pins its blocks and holds it until `resume`, `release` or `abort`.

        None, and nothing changes, when it is in another stage (preempted, held). Raises StaleEpoch when it is not here.
        """
        ...

    def resume(self, request_id: str, epoch: int) -> bool:
        """A paused sequence decodes on, as if it had never stopped; False when none of that epoch is paused. Idempotent."""
        ...

    def export_kv(self, block_id: int, group: int) -> memoryview:
        """The bytes of one layer group of a pinned block, without a copy where the device allows it.

        Only valid for what PrefillProgress or LayerProgress reported as final. Length is `layout.group_bytes(group)`.
        """
        ...

    def import_begin(self, request: EngineRequest, num_tokens: int, ahead_tokens: int = 0) -> ImportTicket:
        """Reserves blocks for `num_tokens` KV rows of `prompt + output`, for `ahead_tokens` rows of outputs that are sampled
        elsewhere meanwhile, and for nothing more.

        Raises OutOfBlocks when the pool cannot give them now, StaleEpoch when the same or a newer epoch is here.
        An older epoch of the request is aborted first.
        """
        ...

    def import_kv(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        """Writes bytes into a block of an open import. Raises BadFrame when they do not fit the layer group.

        Returns a read-only view of them as they lie in the pool now, None where this process cannot look into it. What the
        view shows is of this import until it ends.
        """
        ...

    def import_room(self, places: tuple[KvPlace, ...]) -> KvRoom | None:
        """Where bytes of an open import may be put without a copy, None where this process cannot look into the pool.

        Raises BadFrame as `import_kv` does.
        """
        ...

    def import_commit(
        self, request_id: str, epoch: int, next_token_ids: tuple[int, ...], num_tokens: int | None = None, exact: bool = True
    ) -> None:
        """The imported rows are verified: the sequence decodes from the next step on.

        `next_token_ids` are the outputs sampled elsewhere; the engine does not report them again. `num_tokens` rows came, by
        default those that `import_begin` named; what was reserved beyond them is given back. Full blocks enter the prefix
        cache now and not earlier; where the rows are not `exact`, what this engine would have computed, neither they nor those
        computed on top of them ever do. Raises StaleEpoch when no such import is open.
        """
        ...

    def import_abort(self, request_id: str, epoch: int) -> bool:
        """Drops an open import and frees its blocks; none enters the prefix cache. Idempotent."""
        ...

    def known_names(self) -> set[bytes]:
        """The names of all full blocks that the pool or a lower tier has: those that cache events told of."""
        ...

    def match_prefix(self, names: Sequence[bytes]) -> int:
        """How many of these consecutive names, from the first on, are in the pool. From any thread; changes nothing."""
        ...

    def export_prefix(self, names: Sequence[bytes]) -> PrefixTicket:
        """Pins the longest run of `names` in the pool, maybe none: `export_kv` reads it until `export_prefix_end`."""
        ...

    def recall_prefix(self, names: Sequence[bytes], wait_s: float, lent: Callable[[PrefixTicket], None]) -> int:
        """As `export_prefix`, once what only lower tiers have of `names` is back in the pool; others step meanwhile.

        `names` is a chain. `lent` hears of the ticket once: in this call, or later, from any thread, when the engine looks for
        work. The run is shorter where a block does not verify, where `wait_s` is over, and where the pool has no room beside
        what preempted and running sequences need. `lent` must not call the engine.

        Returns the id of the ticket. `export_prefix_end` ends the waiting too, and `lent` then hears of nothing.
        """
        ...

    def export_prefix_end(self, ticket_id: int) -> bool:
        """Gives back the references of `export_prefix` or `recall_prefix`; False when there are none. Idempotent."""
        ...

    def import_prefix_begin(self, root: bytes, names: Sequence[bytes]) -> PrefixTicket:
        """Reserves blocks for those of `names` that follow the cached ones; the cached ones stay until the import ends.

        `names` is a chain from its first block, `root` the parent of that one. The ticket asks for nothing when all
        are here or nothing is cached in this engine. Raises OutOfBlocks, and reserves nothing, when the pool cannot give
        them without taking what preempted sequences need.
        """
        ...

    def import_prefix_commit(self, ticket_id: int, num_blocks: int) -> int:
        """The first `num_blocks` reserved blocks are verified: they enter the prefix cache without an owner.

        The others are free again. Returns how many names are new; a block whose name was filed meanwhile is freed. Raises
        StaleEpoch when no such import is open, BadFrame, leaving it open, when it has fewer blocks.
        """
        ...

    def import_prefix_abort(self, ticket_id: int) -> bool:
        """Frees the blocks of an open import; none enters the prefix cache. False when there is none. Idempotent."""
        ...

    def stats(self) -> EngineStats:
        """Counters and gauges. May be called from any thread."""
        ...

    def drain_cache_events(self) -> tuple[CacheEvent, ...]:
        """The changes of the prefix cache since the last call, in order."""
        ...

    def audit_disk(self, max_blocks: int, seed: int, told: Callable[[DiskAudit], None]) -> None:
        """Has at most so many blocks of the disk, drawn at random, read and verified beside the steps; corrupt ones go.

        `told` hears of the outcome once: in this call where there is nothing to read, or later, from any thread, when the
        engine looks for work. It must not call the engine.
        """
        ...

    def block_owners(self) -> tuple[BlockOwner, ...]:
        """Everybody who may refer to blocks: each sequence and each pin, in no particular order."""
        ...

    def reclaim_leaked(self) -> int:
        """Gives back references that no owner explains and returns how many blocks had one. Zero unless there is a bug."""
        ...

    def check_integrity(self) -> None:
        """Raises AssertionError with a story when references, tables and free list disagree. For tests and idle moments."""
        ...

    def close(self) -> None:
        """Frees the device. Idempotent."""
        ...
