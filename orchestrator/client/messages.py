"""What a client sends and what it gets, as values. Pure."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protos.contract.errors import InvalidRequest, PeerUnavailable
from protos.wire import common, inference

FINISH_REASONS = {
    common.FINISH_REASON_STOP: "stop",
    common.FINISH_REASON_LENGTH: "length",
    common.FINISH_REASON_CANCELLED: "cancelled",
    common.FINISH_REASON_ERROR: "error",
}


@dataclass(frozen=True, slots=True)
class Accepted:
    """The cluster has the request. The seed makes the answer repeatable."""

    request_id: str
    model: str
    prompt_tokens: int
    seed: int
    text: str = ""
    choice: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """log_softmax of the model's raw logits at one token: the token's own, and of the most probable ones, falling."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens and the text that they complete; `first_index` counts output tokens from 0.

    `logprobs` has one entry for each token when they were asked for; None: not known any more (see inference.proto).
    """

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end. `text` was held back until it was known; `reason` is stop or length; `stop` the stop string, if one."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    timeline: common.Timeline
    stop: str
    text: str
    choice: int = 0


Event = Accepted | Delta | Finished
Turn = tuple[str, str] | Mapping[str, str]
"""One message of a chat: (role, content), or a mapping with these keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer."""

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    seed: int
    stop: str
    timeline: common.Timeline
    logprobs: tuple[TokenLogprobs | None, ...] = ()


def generate_request(
    text: str | None = None,
    *,
    messages: Sequence[Turn] | None = None,
    token_ids: Sequence[int] | None = None,
    model: str = "",
    request_id: str = "",
    timeout_s: float = 0.0,
    priority: int = 0,
    n: int = 1,
    json_schema: str | Mapping[str, Any] | None = None,
    regex: str | None = None,
    lark: str | None = None,
    json_object: bool | None = None,
    **sampling: Any,
) -> inference.GenerateRequest:
    """The message for a prompt: exactly one of text, messages and token_ids.

    `n` completions carry their number as `choice`. `sampling`: temperature, top_p, top_k, min_p, seed, max_tokens,
    min_tokens, stop_token_ids, stop, ignore_eos, repetition_penalty, presence_penalty, frequency_penalty, logit_bias (a
    mapping from token id), logprobs (alternatives, 0 to 20); None means the server's default.
    `json_schema` (text or a mapping), `regex`, `lark` or `json_object` holds the whole output to a grammar.

    Raises InvalidRequest for what a message cannot carry; everything else is the server's to judge.
    """
    if sum(given is not None for given in (text, messages, token_ids)) != 1:
        raise InvalidRequest("prompt: give exactly one of text, messages and token_ids")
    params = {name: value for name, value in sampling.items() if value is not None}
    try:
        grammar = _grammar(json_schema=json_schema, regex=regex, lark=lark, json_object=json_object or None)
        request = inference.GenerateRequest(
            request_id=request_id or f"c-{secrets.token_hex(12)}",
            model=model,
            timeout_s=timeout_s,
            priority=priority,
            n=n if n != 1 else 0,
            sampling=inference.SamplingParams(**params, grammar=grammar),
        )
        if text is not None:
            request.text = text
        elif messages is not None:
            pairs = [turn if isinstance(turn, tuple) else (turn["role"], turn["content"]) for turn in messages]
            turns = [inference.ChatMessage(role=role, content=content) for role, content in pairs]
            request.chat.CopyFrom(inference.Chat(messages=turns))
        else:
            request.token_ids.CopyFrom(inference.TokenIds(ids=token_ids))
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidRequest(f"request: {error}") from error
    return request


def _grammar(**kinds: Any) -> common.Grammar | None:
    given = {kind: value for kind, value in kinds.items() if value is not None}
    if len(given) > 1:
        raise InvalidRequest(f"grammar: {' and '.join(given)} are given; an output follows one of them")
    schema = given.get("json_schema")
    if schema is not None and not isinstance(schema, str):
        given["json_schema"] = json.dumps(schema, ensure_ascii=False)
    return common.Grammar(**given) if given else None


def event_of(event: inference.GenerateEvent) -> Event:
    """One event as a value. Raises PeerUnavailable for a kind that this client does not know."""
    match event.WhichOneof("event"):
        case "accepted":
            one = event.accepted
            return Accepted(one.request_id, one.model, one.prompt_tokens, one.seed, choice=event.choice)
        case "tokens":
            tokens = event.tokens
            logprobs = tuple(_logprobs_of(entry) for entry in tokens.logprobs)
            return Delta(tokens.first_index, tuple(tokens.ids), tokens.text, logprobs, event.choice)
        case "finished":
            end = event.finished
            reason = FINISH_REASONS.get(end.reason, "unspecified")
            return Finished(reason, end.prompt_tokens, end.completion_tokens, end.timeline, end.stop, end.text, event.choice)
        case other:
            raise PeerUnavailable(f"an event of the unknown kind {other}: is the cluster of another version?")


def _logprobs_of(entry: inference.TokenLogprobs) -> TokenLogprobs | None:
    if entry.absent:
        return None
    return TokenLogprobs(entry.logprob, tuple(entry.top_ids), tuple(entry.top_logprobs))


class Collector:
    """Puts the events of one stream together, choice by choice."""

    def __init__(self) -> None:
        self._accepted: dict[int, Accepted] = {}
        self._deltas: dict[int, list[Delta]] = {}
        self.done: dict[int, Completion] = {}

    def take(self, event: Event) -> None:
        """Adds an event; a choice is in `done` once it has finished."""
        match event:
            case Accepted():
                self._accepted[event.choice] = event
            case Delta():
                self._deltas.setdefault(event.choice, []).append(event)
            case Finished():
                accepted, deltas = self._accepted[event.choice], self._deltas.get(event.choice, [])
                self.done[event.choice] = Completion(
                    request_id=accepted.request_id,
                    model=accepted.model,
                    text="".join(delta.text for delta in deltas) + event.text,
                    token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
                    finish_reason=event.reason,
                    prompt_tokens=event.prompt_tokens,
                    seed=accepted.seed,
                    stop=event.stop,
                    timeline=event.timeline,
                    logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
                )
