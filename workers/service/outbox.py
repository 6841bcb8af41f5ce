"""Tokens on their way to the ingresses: kept until acknowledged, replayed after every break and to every new owner.

All tokens that one engine step makes for one ingress leave in one message. An acknowledgement counts only when it comes
from the ingress that the request is addressed to, at the request's epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from protos.contract.token_logprobs import pack_logprobs
from protos.rpc import Dialer
from protos.wire import common, tokens
from workers.engine_api.types import TokenOut
from workers.service.ingress_link import IngressLink, LinkContext
from workers.service.token_tail import TOKEN_BYTES, TokenTail

MAX_REQUESTS_PER_BATCH = 1024
MAX_BATCH_TOKENS = 262_144


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxContext:
    """What the outbox asks of the process around it; `budget_bytes` bounds what all tails keep together."""

    instance_id: str
    incarnation: Callable[[], int]
    on_finished: Callable[[str, int], None]
    on_refused: Callable[[str, int], None]
    reach: Callable[[str], Awaitable[None]]
    dialer: Dialer
    write_timeout_s: float
    budget_bytes: int = 64 * 1024 * 1024


class Outbox:
    """The token tails of all requests here, and one link for each ingress that they are addressed to."""

    def __init__(self, context: OutboxContext) -> None:
        self._context = context
        self._tails: dict[str, TokenTail] = {}
        self._links: dict[str, IngressLink] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._paused = False
        self._kept_tokens = 0
        self._logprobs_bytes = 0
        self._link_context = LinkContext(
            dialer=context.dialer,
            next_batch=self._next_batch,
            on_open=self._on_open,
            on_acks=self._on_acks,
            is_needed=self._is_needed,
            reach=context.reach,
            write_timeout_s=context.write_timeout_s,
        )

    @property
    def unacked_tokens(self) -> int:
        """Tokens kept until an ingress acknowledges them."""
        return self._kept_tokens

    @property
    def is_over_budget(self) -> bool:
        """True when the tails keep more than their budget."""
        return self._kept_tokens * TOKEN_BYTES + self._logprobs_bytes > self._context.budget_bytes

    def longest(self) -> tuple[str, int] | None:
        """The request that keeps the most."""
        tail = max(self._tails.values(), key=lambda t: len(t.kept) * TOKEN_BYTES + t.logprobs_bytes, default=None)
        return None if tail is None else (tail.request_id, tail.epoch)

    def open(self, request_id: str, epoch: int, first_index: int, address: str) -> None:
        """Begins a tail at an output index; an older epoch's is dropped."""
        self.drop(request_id, epoch)
        self._tails[request_id] = TokenTail(
            request_id=request_id, epoch=epoch, address=address, base=first_index, sent=first_index
        )

    def put(self, request_id: str, index: int, token_id: int, logprobs: bytes = b"") -> None:
        """Keeps one token, with its packed logprobs, and has it sent with the next `flush`."""
        self._tails[request_id].put(index, token_id, logprobs)
        self._kept_tokens += 1
        self._logprobs_bytes += len(logprobs)

    def end_of(self, request_id: str) -> int:
        """The output index of the next token of a request that has a tail."""
        return self._tails[request_id].end

    def logprobs_of(self, request_id: str, first: int, count: int) -> tuple[bytes, ...]:
        """The packed logprobs of outputs `[first, first + count)`, empty where they were acknowledged; none if none is kept."""
        tail = self._tails.get(request_id)
        if tail is None or not tail.logprobs_bytes:
            return ()
        kept = range(tail.base, tail.end)
        return tuple(tail.logprobs[at - tail.base] if at in kept else b"" for at in range(first, first + count))

    def describe(self, request_id: str, timeline: common.Timeline) -> None:
        """The timeline goes along with the next message of the request."""
        self._tails[request_id].timeline = timeline

    def finish(self, request_id: str, reason: common.FinishReason) -> None:
        """The token put last was the last one."""
        self._tails[request_id].finish = reason

    def flush(self) -> None:
        """Has everything new sent."""
        if self._paused:
            return
        for address in {tail.address for tail in self._tails.values() if tail.has_news}:
            self._link(address).wake()

    def rehome(self, request_id: str, address: str) -> None:
        """Another ingress owns the request: everything unacknowledged goes there."""
        tail = self._tails.get(request_id)
        if tail is None:
            return
        tail.address, tail.suspended = address, False
        tail.rewind()
        self.flush()
        self._close_unused()

    def drop(self, request_id: str, up_to_epoch: int) -> None:
        """Forgets a request. Idempotent."""
        tail = self._tails.get(request_id)
        if tail is not None and tail.epoch <= up_to_epoch:
            del self._tails[request_id]
            self._kept_tokens -= len(tail.kept)
            self._logprobs_bytes -= tail.logprobs_bytes
            self._close_unused()

    def pause(self) -> None:
        """Sends nothing more until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Sends again."""
        self._paused = False
        self.flush()

    async def close(self) -> None:
        """Ends all streams; what is not acknowledged is lost with them."""
        self._paused = True
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links), *self._closing)

    def _link(self, address: str) -> IngressLink:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = IngressLink(address, self._link_context)
        return link

    def _close_unused(self) -> None:
        """Links stay while any tail is addressed to them; the last one stays for the next request."""
        wanted = {tail.address for tail in self._tails.values()}
        if not wanted:
            return
        for address in [address for address in self._links if address not in wanted]:
            task = asyncio.create_task(self._links.pop(address).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _next_batch(self, address: str) -> tokens.TokenBatch | None:
        if self._paused:
            return None
        batch = tokens.TokenBatch(instance_id=self._context.instance_id, incarnation=self._context.incarnation())
        budget = MAX_BATCH_TOKENS
        for tail in self._tails.values():
            if tail.address != address or not tail.has_news:
                continue
            message = tail.message()
            batch.requests.append(message)
            budget -= (len(message.token_ids) + sum(map(len, message.logprobs))) // TOKEN_BYTES
            if budget <= 0 or len(batch.requests) == MAX_REQUESTS_PER_BATCH:
                break
        return batch if batch.requests else None

    def _is_needed(self, address: str) -> bool:
        return any(tail.address == address for tail in self._tails.values())

    def _on_open(self, address: str) -> None:
        for tail in self._tails.values():
            if tail.address == address:
                tail.rewind()

    def _on_acks(self, address: str, acks: tokens.TokenAcks) -> None:
        for ack in acks.acks:
            tail = self._tails.get(ack.request_id)
            if tail is None or tail.epoch != ack.epoch or tail.address != address:
                continue
            if ack.stale:
                # It may come again as OWNER from another ingress; if the epoch is over, the next beat tells.
                tail.suspended = True
                self._context.on_refused(ack.request_id, ack.epoch)
                continue
            self._logprobs_bytes -= tail.logprobs_bytes
            self._kept_tokens -= tail.acknowledge(ack.next_index)
            self._logprobs_bytes += tail.logprobs_bytes
            if ack.finished:
                self._context.on_finished(ack.request_id, ack.epoch)


def packed_logprobs(token: TokenOut) -> bytes:
    """The logprobs of a token as they travel; no bytes when it has none."""
    found = token.logprobs
    return b"" if found is None else pack_logprobs(found.logprob, found.top_ids, found.top_logprobs)
