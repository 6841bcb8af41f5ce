"""The requests that this ingress owns: each stream with its listeners, its workers and its clock."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.domain.clock import Clock
from orchestrator.ingress.acks import AckBox
from orchestrator.ingress.metrics import Metrics
from orchestrator.ingress.streams import Delivery, Ending, Outcome, Receipt, RequestStream, StreamState, Verdict
from protos.contract.errors import AutanError
from protos.wire import common

_REMEMBERED_ENDS = 8192

_COUNTERS = {
    Verdict.STALE: "stale_refused",
    Verdict.GAP: "gaps_seen",
    Verdict.DIVERGED: "diverged",
    Verdict.INVALID: "invalid_tokens",
}


class LiveStream:
    """One request. Lives until it is terminal in Redis and nobody reads it any more."""

    def __init__(
        self,
        spec: common.RequestSpec,
        stream: RequestStream,
        clock: Clock,
        *,
        deadline_at_s: float,
        submitted_at_s: float | None,
    ) -> None:
        """`submitted_at_s` is None for a request that another process submitted: its latency is not known here."""
        self.spec = spec
        self.stream = stream
        self.deadline_at_s = deadline_at_s
        self.is_accepted = True  # False until the store said so; nothing is promised or written before
        self.owner_epoch = 0  # registration of this ingress under which it owns the request
        self.runs_alone = False  # goes on without listeners
        self.listeners: set[asyncio.Event] = set()
        self.timeline = common.Timeline()
        self._clock = clock
        self._submitted_at_s = submitted_at_s
        self._last_token_at_s: float | None = None
        self._workers: dict[str, tuple[AckBox, int]] = {}  # by instance: where its acks go, the epoch it sent under

    @property
    def request_id(self) -> str:
        """The id of the request."""
        return self.stream.request_id

    @property
    def now_s(self) -> float:
        """The time on the clock of the ingress."""
        return self._clock.now_s()

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.spec.prompt_token_ids) // 4

    @property
    def needs_owner(self) -> bool:
        """True while the request is not terminal in Redis, as far as is known here."""
        return self.stream.state is not StreamState.ENDED

    @property
    def needs_journal(self) -> bool:
        """True when Redis does not have all that is here yet. A stream that may yet be discarded writes nothing."""
        stream = self.stream
        if stream.state is StreamState.ENDED or not self.is_accepted:
            return False
        return stream.journaled < stream.accepted or stream.state is StreamState.COMPLETE

    def receive(self, instance_id: str, box: AckBox, delivery: Delivery, metrics: Metrics) -> Receipt:
        """Takes a delivery and answers the worker where the answer does not depend on the journal."""
        before = self.stream.epoch
        receipt = self.stream.receive(delivery)
        if receipt.verdict in _COUNTERS:
            metrics.count(_COUNTERS[receipt.verdict])
        metrics.count("duplicate_tokens", receipt.duplicates)
        if receipt.verdict is Verdict.STALE:
            box.put(self.request_id, delivery.epoch, 0, stale=True)
            return receipt
        if receipt.verdict is Verdict.ENDED:
            box.put(self.request_id, delivery.epoch, self.stream.accepted, finished=True)
            return receipt
        if self.stream.epoch > before:
            self._refuse_older_workers()
        self._workers[instance_id] = (box, delivery.epoch)
        if receipt.new_tokens:
            self._measure(receipt.new_tokens, metrics)
        if receipt.verdict is Verdict.KNOWN:
            self.acknowledge()
        return receipt

    def acknowledge(self) -> None:
        """Tells the workers how far the journal is, and whether the request has ended."""
        ended = self.stream.state is StreamState.ENDED
        for instance_id, (box, epoch) in list(self._workers.items()):
            if not box.is_open:
                del self._workers[instance_id]
            else:
                box.put(self.request_id, epoch, self.stream.journaled, finished=ended)

    def senders(self) -> list[tuple[AckBox, int]]:
        """Where the workers that sent tokens of it wait for acknowledgements, and under which epoch they sent."""
        return list(self._workers.values())

    def wake(self) -> None:
        """Lets every listener look again."""
        for listener in self.listeners:
            listener.set()

    def _refuse_older_workers(self) -> None:
        for instance_id, (box, epoch) in list(self._workers.items()):
            if epoch < self.stream.epoch:
                box.put(self.request_id, epoch, 0, stale=True)
                del self._workers[instance_id]

    def _measure(self, new_tokens: int, metrics: Metrics) -> None:
        now_s = self.now_s
        metrics.count("tokens_accepted", new_tokens)
        if self._last_token_at_s is not None:
            metrics.itl.observe((now_s - self._last_token_at_s) / new_tokens, new_tokens)
        elif self._submitted_at_s is not None and new_tokens == self.stream.accepted:
            self.timeline.ttft_s = now_s - self._submitted_at_s
            metrics.ttft.observe(self.timeline.ttft_s)
        self._last_token_at_s = now_s


@dataclass(slots=True)
class Gap:
    """Tokens that a stream lacks: when the last sign of them came, and when Redis and the worker were first asked for them."""

    seen_s: float
    asked_s: float | None = None


class StreamTable:
    """All live streams by id, and the last ends, so that a worker that asks again is told.

    `gaps` and `owed` are what recovery works on: streams that lack tokens, and ends that were told here without Redis, with
    the reason to cancel for. A stream whose end is owed stays, so that whoever asks again is told the same.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._live: dict[str, LiveStream] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self.gaps: dict[str, Gap] = {}
        self.owed: dict[str, str] = {}

    def __iter__(self) -> Iterator[LiveStream]:
        return iter(list(self._live.values()))

    def __len__(self) -> int:
        return len(self._live)

    def get(self, request_id: str) -> LiveStream | None:
        """The stream, while it is here."""
        return self._live.get(request_id)

    def has_ended(self, request_id: str) -> bool:
        """True for one of the last requests that ended here."""
        return request_id in self._ended

    def add(self, live: LiveStream) -> None:
        """Takes a stream in. The id must be free."""
        assert live.request_id not in self._live
        self._live[live.request_id] = live
        self._ended.pop(live.request_id, None)

    def discard(self, live: LiveStream) -> None:
        """Forgets a stream that was never accepted."""
        if self._live.get(live.request_id) is live:
            del self._live[live.request_id]
            self.gaps.pop(live.request_id, None)

    def end(self, live: LiveStream, outcome: Outcome) -> None:
        """The request is terminal in Redis, or given up: tells workers and clients. Idempotent."""
        if live.stream.state is StreamState.ENDED:
            return
        live.stream.end(outcome)
        self.gaps.pop(live.request_id, None)
        name = "done" if isinstance(outcome, Ending) else outcome.reason.lower()
        self._metrics.count(f"requests_{name}")
        live.acknowledge()
        live.wake()
        self._forget_if_over(live)

    def give_up(self, live: LiveStream, error: AutanError, reason: str) -> None:
        """Ends a stream without having asked Redis; the request is to be cancelled there for `reason`. Idempotent."""
        if live.stream.state is StreamState.ENDED:
            return
        self.owed[live.request_id] = reason
        self.end(live, error)

    def paid(self, live: LiveStream) -> None:
        """Redis has an end of a request that was given up here."""
        self.owed.pop(live.request_id, None)
        self._forget_if_over(live)

    def lacks_tokens(self, live: LiveStream) -> None:
        """Redis or a worker has tokens of the stream that are beyond its next one."""
        if live.stream.state is not StreamState.ENDED and live.is_accepted:
            self.gaps.setdefault(live.request_id, Gap(live.now_s)).seen_s = live.now_s

    def follows_on(self, live: LiveStream) -> None:
        """A worker sent tokens without a gap: what it was asked for has come. What it was not asked for yet may still lack."""
        gap = self.gaps.get(live.request_id)
        if gap is not None and gap.asked_s is not None:
            del self.gaps[live.request_id]

    def attach(self, live: LiveStream, listener: asyncio.Event) -> None:
        """A client reads along."""
        live.listeners.add(listener)

    def detach(self, live: LiveStream, listener: asyncio.Event) -> None:
        """A client is gone. Idempotent."""
        live.listeners.discard(listener)
        self._forget_if_over(live)

    def _forget_if_over(self, live: LiveStream) -> None:
        if live.stream.state is not StreamState.ENDED or live.listeners or self._live.get(live.request_id) is not live:
            return
        if live.request_id in self.owed:
            return
        del self._live[live.request_id]
        self._ended[live.request_id] = None
        while len(self._ended) > _REMEMBERED_ENDS:
            self._ended.popitem(last=False)
