"""The engine over a runner: continuous batching, chunked prefill, prefix reuse, hand-off of KV blocks."""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter

from protos.contract.block_hash import root_hash
from protos.contract.errors import InvalidRequest, OutOfBlocks, StaleEpoch
from workers.batching.admission import check_ahead, check_fits, check_handed_tokens, check_request, check_room
from workers.batching.cache_tiers import CacheTiers
from workers.batching.constraint import Constrainer, open_constraint
from workers.batching.engine_limits import EngineLimits
from workers.batching.import_gate import ImportGate
from workers.batching.integrity import check_stages
from workers.batching.io_lanes import Lanes, ThreadLanes
from workers.batching.layer_progress import told_by_layers
from workers.batching.ledger import BlockLedger, Grant
from workers.batching.outcome import Counters, StepOutcome
from workers.batching.prefix_exchange import PrefixExchange
from workers.batching.runner import Runner
from workers.batching.scheduler import Plan, StepLimits, plan
from workers.batching.sequence import Sequence, SequenceState
from workers.batching.slicing import slice_of
from workers.batching.tier_report import observe_step, tier_gauges
from workers.batching.tier_returns import TierReturns
from workers.engine_api.block_files import BlockFiles
from workers.engine_api.clock import Clock, SystemClock
from workers.engine_api.protocol import KvRoom, OnLayers
from workers.engine_api.types import (
    BlockOwner,
    CacheEvent,
    EngineRequest,
    EngineStats,
    ImportTicket,
    KvLayout,
    KvPlace,
    ModelIdentity,
    Paused,
    Phase,
    StepResult,
)

_by_age = attrgetter("order")
_NOTHING = StepResult()


class PagedEngine(PrefixExchange):
    """Implements `workers.engine_api.protocol.Engine` for every runner; see there for the guarantees.

    Blocks for all known tokens are given when a sequence starts, later ones one by one as it decodes. When the pool
    is used up the youngest sequence goes back to the queue and is recomputed. A step never has more than
    `max_running` sequences and `max_batch_tokens` rows; older sequences go first.

    One lock covers all bookkeeping, so that `stats` is exact from any thread; it is not held while the runner computes.
    """

    def __init__(
        self,
        runner: Runner,
        limits: EngineLimits,
        constrainer: Constrainer | None = None,
        *,
        files: BlockFiles | None = None,
        clock: Clock | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._runner = runner
        self._constrainer = constrainer
        self._identity = runner.identity
        self._layout = runner.layout
        self._limits = StepLimits(limits.max_batch_tokens, limits.max_running)
        self._clock = clock or SystemClock()
        self._lanes = lanes or ThreadLanes()
        self._tiers: CacheTiers | None = None
        if limits.prefix_cache and limits.host_cache_bytes:
            self._tiers = CacheTiers(runner, limits.host_cache_bytes, files, self._lanes, self._clock)
        self._ledger = BlockLedger(runner.num_blocks, limits.prefix_cache, self._tiers)
        self._returns = TierReturns(self._ledger, self._tiers, self._clock.now_s, self._room_for_fetches)
        self._gate = ImportGate(runner)
        self._lock = threading.Lock()
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # by age
        self._running: list[Sequence] = []  # by age; PREFILLING and DECODING
        self._plan: Plan | None = None
        self._next_order = 0
        self._counters = Counters()
        self._closed = False

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def layout(self) -> KvLayout:
        return self._layout

    def add(self, request: EngineRequest) -> None:
        with self._lock:
            check_request(request, self._identity)
            check_fits(request, self._identity, self._layout.block_tokens, self._ledger.pool.num_blocks)
            sequence = self._enter(request, SequenceState.WAITING)
            self._settle()
            if not self._returns.begin(sequence):
                self._waiting.append(sequence)

    def has_work(self) -> bool:
        with self._lock:
            return not self._current_plan().empty

    def on_wake(self, wake: Callable[[], None]) -> None:
        self._lanes.on_wake(wake)

    def idle_limit_s(self) -> float | None:
        with self._lock:
            return self._returns.idle_limit_s()

    def step(self, on_layers: OnLayers | None = None) -> StepResult:
        with self._lock:
            todo = self._current_plan()
            if todo.empty:
                return _NOTHING
            self._carry_out(todo)
            batch = [slice_of(sequence, 1) for sequence in todo.decodes]
            batch += [slice_of(chunk.sequence, chunk.count) for chunk in todo.chunks]
        started_s = self._clock.now_s()
        drawn = self._runner.run(batch, None if on_layers is None else told_by_layers(todo.chunks, on_layers))
        assert len(drawn) == len(batch), f"the runner answered {len(drawn)} of {len(batch)} slices"
        with self._lock:
            self._plan = None
            if self._tiers is not None:
                observe_step(self._tiers.cost, todo, self._clock.now_s() - started_s)
            outcome = StepOutcome(self._ledger, self._identity, self._counters)
            for sequence, result in zip(todo.decodes, drawn, strict=False):
                outcome.decoded(sequence, result)
            for chunk, result in zip(todo.chunks, drawn[len(todo.decodes) :], strict=True):
                outcome.prefilled(chunk.sequence, chunk.count, result)
            for sequence in outcome.left:
                self._running.remove(sequence)
            for sequence in outcome.ended:
                self._end(sequence)
            self._ledger.copy_ahead()
            return outcome.result()

    def abort(self, request_id: str, up_to_epoch: int) -> bool:
        with self._lock:
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.epoch > up_to_epoch:
                return False
            self._drop(sequence)
            return True

    def release(self, request_id: str, epoch: int) -> bool:
        return self._drop_if(request_id, epoch, SequenceState.HELD)

    def pin(self, request_id: str, epoch: int) -> tuple[int, ...]:
        with self._lock:
            sequence = self._at(request_id, epoch)
            self._plan = None
            return self._ledger.pin(sequence)

    def unpin(self, request_id: str, epoch: int) -> None:
        with self._lock:
            self._plan = None
            self._ledger.unpin((request_id, epoch))

    def pause(self, request_id: str, epoch: int) -> Paused | None:
        with self._lock:
            sequence = self._at(request_id, epoch)
            if sequence.state is not SequenceState.DECODING:
                return None
            self._plan = None
            sequence.move(SequenceState.HELD)
            self._running.remove(sequence)
            output = tuple(sequence.tokens[sequence.num_prompt :])
            return Paused(output, sequence.num_computed, self._ledger.pin(sequence))

    def resume(self, request_id: str, epoch: int) -> bool:
        with self._lock:
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.epoch != epoch or not sequence.is_paused:
                return False
            self._plan = None
            sequence.move(SequenceState.DECODING)
            insort(self._running, sequence, key=_by_age)
            return True

    def export_kv(self, block_id: int, group: int) -> memoryview:
        """Raises StaleEpoch when the block is not pinned (any more)."""
        if not self._ledger.is_pinned(block_id):
            raise StaleEpoch(f"block {block_id} is not pinned: its bytes may belong to another sequence")
        return self._runner.read_block(block_id, group)

    def import_begin(self, request: EngineRequest, num_tokens: int, ahead_tokens: int = 0) -> ImportTicket:
        """The phase of the request does not matter: what was imported decodes here."""
        request = replace(request, phase=Phase.FULL)
        with self._lock:
            check_request(request, self._identity)
            size = self._layout.block_tokens
            check_fits(request, self._identity, size, self._ledger.pool.num_blocks)
            if not 1 <= num_tokens <= len(request.prompt) + len(request.output):
                raise InvalidRequest(f"{request.request_id}: {num_tokens} KV rows of {len(request.prompt)} prompt tokens")
            check_ahead(request, num_tokens, ahead_tokens)
            sequence = self._enter(request, SequenceState.IMPORTING)
            try:
                # The last known token of a sequence that decodes elsewhere may have no row there: it stays to be written.
                hits = self._ledger.match(sequence, num_tokens - (ahead_tokens > 0))
                total = -(-(num_tokens + ahead_tokens) // size)
                check_room(total - len(hits), self._waiting, self._ledger.pool)
                self._ledger.give([Grant(sequence, hits, total)])
            except OutOfBlocks:
                self._leave(sequence)
                raise
            sequence.num_computed = num_tokens
            self._gate.open(sequence.blocks[len(hits) :])
            return ImportTicket(
                request_id=request.request_id, epoch=request.epoch, block_ids=sequence.table, reused_blocks=len(hits)
            )

    def import_kv(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        return self._gate.write(block_id, group, offset_bytes, data)

    def import_room(self, places: tuple[KvPlace, ...]) -> KvRoom | None:
        return self._gate.room(places)

    def import_commit(
        self, request_id: str, epoch: int, next_token_ids: tuple[int, ...], num_tokens: int | None = None, exact: bool = True
    ) -> None:
        """Raises BadFrame, and leaves the import open, when the sequence cannot go on behind `next_token_ids`."""
        with self._lock:
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.epoch != epoch or sequence.state is not SequenceState.IMPORTING:
                raise StaleEpoch(f"{request_id}: no import of epoch {epoch} is open")
            rows = sequence.num_computed if num_tokens is None else num_tokens
            room_tokens = len(sequence.blocks) * self._layout.block_tokens
            check_handed_tokens(sequence.request, next_token_ids, rows, room_tokens, self._identity)
            self._plan = None
            self._gate.close(sequence.blocks)
            sequence.imported(next_token_ids, rows, exact)
            self._ledger.trim(sequence)
            self._ledger.file_computed(sequence)
            sequence.foresee()
            if len(sequence.tokens) == sequence.num_computed + 1:
                sequence.move(SequenceState.DECODING)
                insort(self._running, sequence, key=_by_age)
            else:
                # Rows in the middle are missing: computed here, on top of what the prefix cache has now.
                self._requeue(sequence)

    def import_abort(self, request_id: str, epoch: int) -> bool:
        return self._drop_if(request_id, epoch, SequenceState.IMPORTING)

    def stats(self) -> EngineStats:
        with self._lock:
            self._settle()
            sequences, pool = self._sequences.values(), self._ledger.pool
            return self._counters.stats(
                **tier_gauges(self._tiers, self._layout),
                restoring=self._returns.restoring,
                known_names=self._ledger.known_names,
                total_blocks=pool.num_blocks,
                used_blocks=pool.used,
                cached_blocks=pool.cached,
                free_blocks=pool.free,
                waiting=len(self._waiting) + self._returns.restoring,
                running=len(self._running),
                holding=sum(s.state is SequenceState.HELD for s in sequences),
                importing=sum(s.state is SequenceState.IMPORTING for s in sequences),
                leaked_blocks=self._ledger.leaked(sequences),
                expert_visits=self._runner.expert_visits(),
            )

    def drain_cache_events(self) -> tuple[CacheEvent, ...]:
        with self._lock:
            self._settle()
            return self._ledger.drain_events()

    def block_owners(self) -> tuple[BlockOwner, ...]:
        with self._lock:
            return self._ledger.owners(self._sequences.values())

    def reclaim_leaked(self) -> int:
        with self._lock:
            self._plan = None
            return self._ledger.reclaim(self._sequences.values())

    def check_integrity(self) -> None:
        with self._lock:
            self._ledger.check_integrity(self._sequences.values())
            check_stages(self._sequences.values(), self._waiting, self._running)
            self._returns.check_integrity(self._sequences.values())

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._constrainer is not None:
                self._constrainer.close()
            if self._tiers is not None:
                self._tiers.close()
            self._runner.close()

    def _current_plan(self) -> Plan:
        """The plan of the next step; kept until anything changes."""
        self._settle()
        if self._plan is None:
            self._plan = plan(self._waiting, self._running, self._ledger.pool, self._limits, self._ledger.match_prefill)
        return self._plan

    def _settle(self) -> None:
        """Prompts whose blocks came back, or are computed after all, wait to be scheduled again."""
        back, moved = self._returns.settle()
        if moved:
            self._plan = None
        for sequence in back:
            insort(self._waiting, sequence, key=_by_age)

    def _room_for_fetches(self) -> int:
        """Blocks that a fetch may take: what preempted sequences need, and one for each running one, stays."""
        owed = sum(sequence.blocks_for_known for sequence in self._waiting if sequence.preempted)
        return self._ledger.pool.available - owed - len(self._running)

    def _carry_out(self, todo: Plan) -> None:
        """Moves blocks and sequences as planned; the runner has not computed yet."""
        self._plan = None
        for sequence in todo.preempt:
            self._running.remove(sequence)
            self._requeue(sequence)
            self._counters.preemptions += 1
        self._ledger.give([Grant(a.sequence, a.hits, a.sequence.blocks_for_known) for a in todo.admit])
        for admission in todo.admit:
            sequence = admission.sequence
            sequence.num_computed = sequence.cached_tokens = len(admission.hits) * self._layout.block_tokens
            self._counters.prefix_hit_tokens += sequence.cached_tokens
            self._ledger.used(sequence, len(admission.hits))
            sequence.move(SequenceState.PREFILLING)
            insort(self._running, sequence, key=_by_age)
        del self._waiting[: len(todo.admit)]
        for sequence in todo.grow:
            self._ledger.grow(sequence)

    def _enter(self, request: EngineRequest, state: SequenceState) -> Sequence:
        """A new sequence; an older epoch of it is dropped. Raises StaleEpoch when the same or a newer epoch is here."""
        known = self._sequences.get(request.request_id)
        if known is not None and known.epoch >= request.epoch:
            raise StaleEpoch(f"{request.request_id}: epoch {known.epoch} is here, {request.epoch} is not newer")
        constraint = open_constraint(self._constrainer, request)
        if known is not None:
            self._drop(known)
        self._plan = None
        root = root_hash(self._identity.weights_digest, request.cache_salt)
        sequence = Sequence(request, self._next_order, self._layout.block_tokens, root, state, constraint)
        sequence.foresee()
        self._next_order += 1
        self._sequences[request.request_id] = sequence
        return sequence

    def _at(self, request_id: str, epoch: int) -> Sequence:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.epoch != epoch:
            raise StaleEpoch(f"{request_id}: epoch {epoch} is not here")
        return sequence

    def _requeue(self, sequence: Sequence) -> None:
        sequence.move(SequenceState.WAITING)
        sequence.preempted = True
        self._ledger.take_back(sequence)
        insort(self._waiting, sequence, key=_by_age)

    def _drop_if(self, request_id: str, epoch: int, state: SequenceState) -> bool:
        with self._lock:
            sequence = self._sequences.get(request_id)
            if sequence is None or sequence.epoch != epoch or sequence.state is not state:
                return False
            self._drop(sequence)
            return True

    def _drop(self, sequence: Sequence) -> None:
        """Ends a sequence in whatever stage."""
        if sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is SequenceState.RESTORING:
            self._returns.forget(sequence)
        elif sequence.state in (SequenceState.PREFILLING, SequenceState.DECODING):
            self._running.remove(sequence)
        self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        """Ends a sequence that is in no queue."""
        self._plan = None
        if sequence.state is SequenceState.IMPORTING:
            self._gate.close(sequence.blocks)
        self._ledger.take_back(sequence)
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        sequence.move(SequenceState.ENDED)
        del self._sequences[sequence.request_id]
