"""The tokens of one request that no ingress has acknowledged yet. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from protos.contract.redis_names import pack_tokens
from protos.wire import common, tokens

TOKEN_BYTES = 4
MAX_TOKENS_PER_MESSAGE = 16_384
LOGPROBS_PER_MESSAGE = 2048


@dataclass(slots=True, kw_only=True)
class TokenTail:
    """Output tokens `[base, base + len(kept))` of one request at one epoch; those below `sent` went out on the open stream."""

    request_id: str
    epoch: int
    address: str
    base: int
    sent: int
    kept: list[int] = field(default_factory=list)
    logprobs: list[bytes] = field(default_factory=list)  # of each kept token; empty bytes: none
    logprobs_bytes: int = 0
    finish: common.FinishReason = common.FINISH_REASON_UNSPECIFIED
    finish_sent: bool = False
    timeline: common.Timeline | None = None
    suspended: bool = False

    @property
    def end(self) -> int:
        """The output index of the next token to come."""
        return self.base + len(self.kept)

    @property
    def has_news(self) -> bool:
        """True when the open stream lacks something of it."""
        unfinished = self.finish != common.FINISH_REASON_UNSPECIFIED and not self.finish_sent
        return not self.suspended and (self.sent < self.end or unfinished)

    def put(self, index: int, token_id: int, logprobs: bytes = b"") -> None:
        """Keeps the next token. An assertion fails on a gap: the engine numbers its tokens without gaps."""
        assert index == self.end, f"{self.request_id}: token {index} after {self.end}"
        self.kept.append(token_id)
        self.logprobs.append(logprobs)
        self.logprobs_bytes += len(logprobs)

    def message(self) -> tokens.RequestTokens:
        """What the open stream lacks, at most MAX_TOKENS_PER_MESSAGE of it; counts as sent from now on."""
        first = self.sent
        most = LOGPROBS_PER_MESSAGE if self.logprobs_bytes else MAX_TOKENS_PER_MESSAGE
        ids = self.kept[first - self.base : first - self.base + most]
        self.sent = first + len(ids)
        ends = self.finish != common.FINISH_REASON_UNSPECIFIED and self.sent == self.end
        self.finish_sent = ends
        message = tokens.RequestTokens(
            request_id=self.request_id,
            epoch=self.epoch,
            first_index=first,
            token_ids=pack_tokens(ids),
            finish=self.finish if ends else common.FINISH_REASON_UNSPECIFIED,
        )
        if self.logprobs_bytes:
            message.logprobs.extend(self.logprobs[first - self.base : first - self.base + len(ids)])
        if self.timeline is not None:
            message.timeline.CopyFrom(self.timeline)
            self.timeline = None if not ends else self.timeline
        return message

    def acknowledge(self, next_index: int) -> int:
        """Forgets the tokens below `next_index` and returns how many; an index beyond the end counts as the end."""
        passed = max(0, min(next_index, self.end) - self.base)
        self.logprobs_bytes -= sum(map(len, self.logprobs[:passed]))
        del self.kept[:passed], self.logprobs[:passed]
        self.base += passed
        self.sent = max(self.sent, self.base)
        return passed

    def rewind(self) -> None:
        """Everything kept has to be sent again: the stream is a new one."""
        self.sent = self.base
        self.finish_sent = False
