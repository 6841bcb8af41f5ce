"""A store as the core sees it, in plain Python, and builders of views: for tests of the core without any I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from orchestrator.control import effects as do
from orchestrator.control import events as on
from orchestrator.control.core import OrchestratorCore
from orchestrator.control.effects import Effect
from orchestrator.control.events import Event
from orchestrator.control.settings import CoreSettings
from orchestrator.control.story import Recorder
from orchestrator.domain.clock import ManualClock
from orchestrator.domain.ids import Epoch, Incarnation, InstanceId, LeaderEpoch, RequestId
from orchestrator.domain.instance import Capabilities, InstanceState, InstanceView, Role
from orchestrator.domain.request import HELD_STATES, RequestState
from orchestrator.domain.view import ClusterView, QueuedRequest
from orchestrator.policy.migration import RunningRequest
from protos.contract.redis_names import Code

STORE_EPOCH_MS = 1_800_000_000_000


def capabilities(
    *,
    blocks: int = 64,
    batch_tokens: int = 512,
    running: int = 16,
    block_tokens: int = 16,
    context: int = 4096,
    fingerprint: str = "f",
) -> Capabilities:
    """A small instance of model `m`: 64 blocks of 16 tokens."""
    return Capabilities(
        model="m",
        fingerprint=fingerprint,
        block_tokens=block_tokens,
        total_blocks=blocks,
        context_tokens=context,
        max_batch_tokens=batch_tokens,
        max_running=running,
    )


def an_instance(
    name: str = "prefill-0",
    role: Role | None = None,
    *,
    state: InstanceState = InstanceState.READY,
    prefills: int = 0,
    prefill_tokens: int = 0,
    prefill_blocks: int = 0,
    decodes: int = 0,
    decode_blocks: int = 0,
    incarnation: int = 1,
    beat_ms: int = STORE_EPOCH_MS,
    want_drain: bool = False,
    caps: Capabilities | None = None,
) -> InstanceView:
    """An idle READY instance whose role is the first part of its name."""
    return InstanceView(
        instance_id=InstanceId(name),
        role=role or Role(name.split("-", maxsplit=1)[0]),
        address="127.0.0.1:1",
        incarnation=Incarnation(incarnation),
        state=state,
        beat_ms=beat_ms,
        want_drain=want_drain,
        prefill_requests=prefills,
        prefill_tokens=prefill_tokens,
        prefill_blocks=prefill_blocks,
        decode_requests=decodes,
        decode_blocks=decode_blocks,
        capabilities=caps or capabilities(),
    )


def a_request(
    name: str = "r1",
    prompt: int = 100,
    max_tokens: int = 28,
    *,
    output: int = 0,
    priority: int = 0,
    epoch: int = 0,
    at_ms: int = 0,
) -> QueuedRequest:
    """A queued request; by default it fills eight blocks of 16 tokens at its longest."""
    return QueuedRequest(
        request_id=RequestId(name),
        epoch=Epoch(epoch),
        prompt_tokens=prompt,
        max_tokens=max_tokens,
        output_tokens=output,
        priority=priority,
        submitted_ms=STORE_EPOCH_MS + at_ms,
        deadline_ms=STORE_EPOCH_MS + 600_000,
        tenant="t",
        model="m",
        attempts=0,
    )


def a_view(instances: Sequence[InstanceView], queued: Sequence[QueuedRequest], now_ms: int = STORE_EPOCH_MS) -> ClusterView:
    """A view with this queue, in this order."""
    return ClusterView(now_ms=now_ms, queued_total=len(queued), queued=tuple(queued), instances=tuple(instances))


@dataclass
class _Held:
    """A request of the world."""

    request: QueuedRequest
    order: int
    state: RequestState = RequestState.QUEUED
    assignment: do.Assignment | None = None
    prefill_open: bool = False
    moves: int = 0


@dataclass
class CoreWorld:
    """The core, a clock, and the store that answers it. Nothing is random here: who drives it decides what happens."""

    settings: CoreSettings = field(default_factory=CoreSettings)
    clock: ManualClock = field(default_factory=ManualClock)

    def __post_init__(self) -> None:
        self.core = OrchestratorCore(self.settings, self.clock.now_s())
        self.recorder = Recorder(limit=1 << 20, whole=True)
        self.instances: dict[str, InstanceView] = {}
        self.requests: dict[str, _Held] = {}
        self.pending: list[Effect] = []
        self.wake_at_s = 0.0
        self.leader = ("", 0)  # name, epoch
        self.silent: set[str] = set()  # instances that beat no more

    @property
    def now_ms(self) -> int:
        """The store's clock."""
        return STORE_EPOCH_MS + round(self.clock.now_s() * 1000)

    # What the world does.

    def add(self, instance: InstanceView) -> None:
        self.instances[instance.instance_id] = instance

    def submit(self, request: QueuedRequest) -> None:
        self.requests[request.request_id] = _Held(replace(request, submitted_ms=self.now_ms), len(self.requests))

    def hand_over(self, request_id: str) -> None:
        """The prefill side is done with it."""
        held = self.requests[request_id]
        self._leave_prefill(held)
        held.state = RequestState.DECODING

    def finish(self, request_id: str) -> None:
        self._leave(self.requests[request_id])
        self.requests[request_id].state = RequestState.DONE

    def requeue(self, request_id: str) -> None:
        self._leave(self.requests[request_id])
        self.requests[request_id].state = RequestState.QUEUED

    def beat(self) -> None:
        """Every instance that is not silent gives a sign of life."""
        for name, instance in self.instances.items():
            if name in self.silent:
                continue
            self.instances[name] = replace(instance, beat_ms=self.now_ms)

    def queue(self) -> list[QueuedRequest]:
        waiting = [held for held in self.requests.values() if held.state is RequestState.QUEUED]
        return [held.request for held in sorted(waiting, key=lambda held: (-held.request.priority, held.order))]

    def states(self) -> dict[str, RequestState]:
        return {name: held.state for name, held in self.requests.items()}

    # What the core is told.

    def feed(self, event: Event) -> list[Effect]:
        effects = self.core.handle(event, self.clock.now_s())
        self.recorder.record(event, effects, self.clock.now_s())
        for effect in effects:
            if isinstance(effect, do.WakeAt):
                self.wake_at_s = effect.at_s
            elif not isinstance(effect, do.Explain):
                self.pending.append(effect)
        return effects

    def answer(self, effect: Effect) -> list[Effect]:
        """Carries a pending effect out and tells the core the outcome."""
        self.pending.remove(effect)
        return self.feed(self.execute(effect))

    def settle(self) -> list[Effect]:
        """Answers everything that is pending, oldest first, until nothing is."""
        seen: list[Effect] = []
        while self.pending:
            seen.append(self.pending[0])
            self.answer(self.pending[0])
        return seen

    def run(self, seconds: float, beating: bool = True) -> list[Effect]:
        """Lets time pass, with every tick that the core asks for and immediate answers."""
        end_s = self.clock.now_s() + seconds
        seen = self.settle()
        while self.wake_at_s <= end_s:
            self.clock.advance(max(0.0, self.wake_at_s - self.clock.now_s()))
            if beating:
                self.beat()
            self.feed(on.Ticked())
            seen += self.settle()
        self.clock.advance(end_s - self.clock.now_s())
        return seen

    # The store.

    def execute(self, effect: Effect) -> Event:
        """What the library would do and say."""
        match effect:
            case do.Lead():
                return self._lead(effect)
            case do.ReadView():
                return on.ViewRead(effect.number, self.view(effect.queue_limit))
            case do.Assign() if effect.epoch != self.leader[1] or self.leader[0] != "us":
                return on.LeadershipLost(effect.epoch)
            case do.Assign():
                return on.AssignReplied(effect.number, tuple(self._assign(item) for item in effect.items))
            case do.ReadRunning():
                return on.RunningRead(effect.number, tuple(self._running(effect.instances)))
            case do.Migrate() if effect.epoch != self.leader[1] or self.leader[0] != "us":
                return on.LeadershipLost(effect.epoch)
            case do.Migrate():
                return on.MigrateReplied(
                    effect.number, tuple(self._migrate(item, effect.max_migrations) for item in effect.items)
                )
            case do.Reap() if effect.epoch != self.leader[1] or self.leader[0] != "us":
                return on.LeadershipLost(effect.epoch)
            case do.Reap():
                return self._reap(effect)
            case _:
                raise TypeError(f"no answer to {effect!r}")

    def view(self, queue_limit: int = 256) -> ClusterView:
        queue = self.queue()
        return ClusterView(
            now_ms=self.now_ms,
            queued_total=len(queue),
            queued=tuple(queue[:queue_limit]),
            instances=tuple(self.instances[name] for name in sorted(self.instances)),
        )

    def _lead(self, effect: do.Lead) -> Event:
        name, epoch = self.leader
        if name not in {"", "us"}:
            return on.LeadershipDenied(effect.number, LeaderEpoch(epoch), self.now_ms)
        if name == "us" and effect.epoch == epoch:
            return on.LeadershipKept(effect.number, LeaderEpoch(epoch), self.now_ms)
        self.leader = ("us", epoch + 1)
        return on.LeadershipGained(effect.number, LeaderEpoch(epoch + 1), self.now_ms)

    def _assign(self, item: do.Assignment) -> on.AssignOutcome:
        held = self.requests[item.request_id]
        epoch = held.request.epoch
        if epoch != item.expected_epoch:
            return on.AssignOutcome(item.request_id, Code.STALE, epoch)
        if held.state is not RequestState.QUEUED:
            return on.AssignOutcome(item.request_id, Code.STATE, epoch)
        for name, incarnation in ((item.prefill, item.prefill_incarnation), (item.decode, item.decode_incarnation)):
            instance = self.instances[name]
            if not instance.takes_work or instance.incarnation != incarnation:
                return on.AssignOutcome(item.request_id, Code.STALE, epoch)
        held.state, held.assignment, held.prefill_open = RequestState.ASSIGNED, item, True
        held.request = replace(held.request, epoch=Epoch(epoch + 1))
        self._charge_prefill(held, item, 1)
        self._charge_decode(item, 1)
        return on.AssignOutcome(item.request_id, Code.OK, held.request.epoch)

    def _running(self, names: Sequence[InstanceId]) -> list[RunningRequest]:
        return [
            RunningRequest(
                held.request.request_id, held.request.epoch, held.assignment.decode,
                held.request.prompt_tokens + held.request.output_tokens,
                left_tokens=held.request.max_tokens - held.request.output_tokens, blocks=held.assignment.decode_blocks,
                moves=held.moves, next_epoch=Epoch(held.request.epoch + 1),
                most_tokens=held.request.prompt_tokens + held.request.max_tokens, deadline_ms=held.request.deadline_ms,
            )
            for held in self.requests.values()
            if held.state is RequestState.DECODING and held.assignment is not None and held.assignment.decode in names
        ]  # fmt: skip

    def _migrate(self, item: do.Moved, most: int) -> on.AssignOutcome:
        """A move that is over at once."""
        held, target = self.requests[item.request_id], self.instances[item.target]
        if held.request.epoch != item.expected_epoch or not target.takes_work or target.incarnation != item.target_incarnation:
            return on.AssignOutcome(item.request_id, Code.STALE, Epoch(0))
        if held.state is not RequestState.DECODING or held.assignment is None or held.assignment.decode == item.target:
            return on.AssignOutcome(item.request_id, Code.STATE, Epoch(0))
        if held.moves >= most:
            return on.AssignOutcome(item.request_id, Code.FULL, Epoch(0))
        self._charge_decode(held.assignment, -1)
        held.moves += 1
        held.request = replace(held.request, epoch=item.move_epoch)
        held.assignment = replace(
            held.assignment, decode=item.target, decode_incarnation=item.target_incarnation, decode_blocks=item.blocks
        )
        self._charge_decode(held.assignment, 1)
        return on.AssignOutcome(item.request_id, Code.OK, item.move_epoch)

    def _reap(self, effect: do.Reap) -> on.Reaped:
        lost = []
        for name, instance in self.instances.items():
            is_late = self.now_ms - instance.beat_ms >= effect.lost_ms
            if is_late and instance.state in {InstanceState.READY, InstanceState.STARTING, InstanceState.DRAINING}:
                self.instances[name] = replace(instance, state=InstanceState.LOST)
                lost.append(instance.instance_id)
        ended = []
        for name, held in self.requests.items():
            item = held.assignment
            if held.state in HELD_STATES and item is not None and {item.prefill, item.decode} & set(lost):
                self.requeue(name)
                ended.append(on.Ended(RequestId(name), RequestState.QUEUED))
        return on.Reaped(self.now_ms, tuple(ended), tuple(lost))

    def _charge_prefill(self, held: _Held, item: do.Assignment, sign: int) -> None:
        source = self.instances[item.prefill]
        self.instances[item.prefill] = replace(
            source,
            prefill_requests=source.prefill_requests + sign,
            prefill_tokens=source.prefill_tokens + sign * held.request.prefill_tokens,
            prefill_blocks=source.prefill_blocks + sign * item.prefill_blocks,
        )

    def _charge_decode(self, item: do.Assignment, sign: int) -> None:
        target = self.instances[item.decode]
        self.instances[item.decode] = replace(
            target,
            decode_requests=target.decode_requests + sign,
            decode_blocks=target.decode_blocks + sign * item.decode_blocks,
        )

    def _leave_prefill(self, held: _Held) -> None:
        if held.prefill_open and held.assignment is not None:
            held.prefill_open = False
            self._charge_prefill(held, held.assignment, -1)

    def _leave(self, held: _Held) -> None:
        self._leave_prefill(held)
        if held.assignment is not None:
            self._charge_decode(held.assignment, -1)
            held.assignment = None


def assigned(effects: Sequence[Effect]) -> dict[str, tuple[str, str]]:
    """Request -> (prefill, decode) of all Assigns among the effects."""
    return {
        item.request_id: (item.prefill, item.decode)
        for effect in effects
        if isinstance(effect, do.Assign)
        for item in effect.items
    }
