"""From a client's message to an accepted request: validate, tokenise, submit once."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from orchestrator.domain.clock import Clock
from orchestrator.ingress.adopt import Adopter
from orchestrator.ingress.auth import Principal
from orchestrator.ingress.chat import Message, encode_chat
from orchestrator.ingress.departures import Departures
from orchestrator.ingress.journal import Journal
from orchestrator.ingress.live import LiveStream, StreamTable
from orchestrator.ingress.metrics import Metrics
from orchestrator.ingress.model import ServedModel
from orchestrator.ingress.owner import Ownership
from orchestrator.ingress.records import spec_of, stream_of
from orchestrator.ingress.validate import (
    Limits,
    ValidRequest,
    check_messages,
    check_model,
    check_request,
    check_text,
    fit,
)
from orchestrator.ingress.watch import Watch
from orchestrator.store.client import Store
from orchestrator.store.replies import SubmitReply
from protos.contract.errors import InvalidRequest, QueueFull, RequestConflict, StoreUnavailable, UnavailableError
from protos.contract.grammar import Grammar
from protos.contract.redis_names import Code
from protos.wire import inference

logger = logging.getLogger(__name__)

_INLINE_CHARS = 2048  # a text of this length is tokenised on the event loop, in well under a millisecond
_TEMPLATE_FACTOR = 4  # a template may make a chat this much longer before the length of its tokens is known
_TEMPLATE_CHARS = 65_536
_SEED_BITS = 53  # survives a passage through JSON
_RETRY_AFTER_S = 1.0


class Intake:
    """Accepts requests. An id is accepted once, however often and from wherever it is sent."""

    def __init__(
        self,
        *,
        store: Store,
        owner: Ownership,
        table: StreamTable,
        journal: Journal,
        watch: Watch,
        adopter: Adopter,
        departures: Departures,
        model: ServedModel,
        limits: Limits,
        clock: Clock,
        metrics: Metrics,
        queue_limit: int,
    ) -> None:
        self._store = store
        self._owner = owner
        self._table = table
        self._journal = journal
        self._watch = watch
        self._adopter = adopter
        self._departures = departures
        self._model = model
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._queue_limit = queue_limit
        self.is_draining = False
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenise")

    def close(self) -> None:
        """Stops the threads. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._model.grammars is not None:
            self._model.grammars.close()

    async def accept(
        self, request: inference.GenerateRequest, principal: Principal, time_left_s: float | None = None
    ) -> LiveStream:
        """The stream of the request, accepted now or before.

        `time_left_s`: what is left of the caller's own deadline. Raises RequestError, CapacityError, UnavailableError.
        """
        if self.is_draining:
            raise UnavailableError("the cluster is draining and takes no new requests; come back later", _RETRY_AFTER_S)
        model = self._model
        checked = check_request(request, model.name, model.card, self._limits, self._max_token_bytes)
        if checked.sampling.grammar is not None:
            await self._check_grammar(checked.sampling.grammar)
        prompt = await self._encode(checked.text, checked.messages, checked.token_ids)
        valid = fit(checked, prompt, model.card, self._limits, lambda: secrets.randbits(_SEED_BITS))
        self._owner.check()
        request_id = checked.request_id or f"r-{secrets.token_hex(12)}"
        timeout_s = checked.timeout_s if time_left_s is None else min(checked.timeout_s, max(0.001, time_left_s))
        try:
            async with self._adopter.lock(request_id):
                return await self._submit(valid, request_id, principal.tenant, timeout_s)
        except StoreUnavailable:
            if not checked.request_id:
                # It may have been accepted all the same, under an id that nobody was told.
                self._departures.cancel_later(request_id, principal.tenant, "client was told that it failed")
            raise

    async def tokenize(self, request: inference.TokenizeRequest) -> Sequence[int]:
        """Token ids of a text or a chat, as Generate would see them. Raises RequestError."""
        model = self._model
        check_model(request.model, model.name)
        match request.WhichOneof("input"):
            case "text":
                check_text(request.text, model.card, self._limits, self._max_token_bytes)
                return await self._encode(request.text, None, None)
            case "chat":
                messages = check_messages(request.chat, model.card, self._limits, self._max_token_bytes)
                return await self._encode(None, messages, None)
            case _:
                raise InvalidRequest("input: send one of text and chat")

    @property
    def _max_token_bytes(self) -> int:
        return self._model.tokenizer.max_token_bytes if self._model.tokenizer else 1

    async def _check_grammar(self, grammar: Grammar) -> None:
        if self._model.grammars is None:
            raise InvalidRequest(f"sampling.grammar: model {self._model.name} cannot be held to a grammar; leave it out")
        await self._model.grammars.check(grammar)

    async def _encode(
        self, text: str | None, messages: tuple[Message, ...] | None, token_ids: Sequence[int] | None
    ) -> Sequence[int]:
        if token_ids is not None:
            return token_ids
        tokenizer = self._model.tokenizer
        if tokenizer is None:
            raise InvalidRequest(f"input: model {self._model.name} has no tokenizer here; send token_ids")
        if text is not None:
            return await self._off_loop(partial(tokenizer.encode, text), len(text))
        if self._model.chat is None:
            raise InvalidRequest(f"chat: model {self._model.name} has no chat template; send text")
        turns = messages or ()
        chars = sum(len(turn.content) for turn in turns)
        longest = _TEMPLATE_FACTOR * chars + _TEMPLATE_CHARS
        return await self._off_loop(partial(encode_chat, self._model.chat, tokenizer, turns, longest), _INLINE_CHARS)

    async def _off_loop(self, work: Callable[[], Sequence[int]], chars: int) -> Sequence[int]:
        if chars < _INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _submit(self, valid: ValidRequest, request_id: str, tenant: str, timeout_s: float) -> LiveStream:
        here = self._table.get(request_id)
        live = here or self._fresh(valid, request_id, tenant, timeout_s)
        if here is None:
            # In the table before the store knows it: its first tokens may come before the store's reply. They stay in memory
            # until then: without the reply it is not known whose tokens they are, and another stream may come to hold the id.
            self._table.add(live)
        try:
            reply = await self._send(valid, live, request_id, tenant, timeout_s)
        except BaseException:
            if here is None:
                self._discard(live)
            raise
        if reply.code is Code.OK:
            live.is_accepted = True
            live.owner_epoch = self._owner.epoch
            self._journal.mark(live)
            self._metrics.count("requests_accepted")
            return live
        if here is None:
            self._discard(live)
        match reply.code:
            case Code.DUPLICATE:
                self._metrics.count("requests_duplicate")
                return await self._adopter.find_locked(request_id, tenant)
            case Code.FULL:
                raise QueueFull(f"{reply.queued} requests are waiting, which is the limit; come back later", _RETRY_AFTER_S)
            case _:
                raise RequestConflict(f"request_id: {request_id} is taken by a request with another body; choose another id")

    def _discard(self, live: LiveStream) -> None:
        """Forgets a stream that is not accepted. What workers sent to it is of a request all the same and must come again."""
        self._table.discard(live)
        for box, epoch in live.senders():
            self._watch.wanted(live.request_id, epoch, box)

    async def _send(self, valid: ValidRequest, live: LiveStream, request_id: str, tenant: str, timeout_s: float) -> SubmitReply:
        return await self._store.submit(
            request_id=request_id,
            body_hash=valid.checked.body_hash,
            spec=live.spec.SerializeToString(),
            tenant=tenant,
            model=valid.checked.model,
            prompt_tokens=len(valid.prompt_token_ids),
            max_tokens=valid.max_tokens,
            prio=valid.checked.priority,
            timeout_ms=max(1, int(timeout_s * 1000)),
            ingress_id=self._owner.ingress_id,
            ingress_epoch=self._owner.epoch,
            ingress_addr=self._owner.address,
            queue_limit=self._queue_limit,
        )

    def _fresh(self, valid: ValidRequest, request_id: str, tenant: str, timeout_s: float) -> LiveStream:
        spec = spec_of(valid, request_id, tenant, self._model)
        now_s = self._clock.now_s()
        live = LiveStream(
            spec, stream_of(spec, self._model), self._clock, deadline_at_s=now_s + timeout_s, submitted_at_s=now_s
        )
        live.is_accepted = False
        return live
