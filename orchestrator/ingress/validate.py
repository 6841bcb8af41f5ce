"""The one validator of requests. Every front end uses it, so no front end can skip a limit. Pure.

Values are refused, never clamped: a request that runs is the request that was sent. Lengths are looked at before anything
is iterated. `check_request` comes before tokenisation, `fit` after it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from configs.model_card import ModelCard
from orchestrator.ingress.chat import Message
from orchestrator.ingress.grammar import read_grammar
from orchestrator.ingress.logit_rules import LogitRules, check_logit_rules
from protos.contract.errors import InvalidRequest, PromptTooLong, UnknownModel
from protos.contract.grammar import Grammar
from protos.contract.redis_names import is_name
from protos.wire import inference

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_MESSAGES = 1024
MAX_TEMPERATURE = 100.0
MAX_SEED = 2**64 - 1
ROLES = ("system", "user", "assistant")
_PREVIEW_CHARS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the operator sets and what protects the front door."""

    default_max_tokens: int
    default_timeout_s: float
    max_timeout_s: float = 86_400.0
    max_prompt_bytes: int = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingChoice:
    """Checked sampling parameters. `seed` and `max_tokens` are None until the request fits."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    max_tokens: int | None
    min_tokens: int
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    ignore_eos: bool
    logits: LogitRules
    grammar: Grammar | None = None


Prompt = str | tuple[Message, ...] | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """A request whose every field is in range. `text`, `messages` and `token_ids`: exactly one is set."""

    request_id: str
    model: str
    text: str | None
    messages: tuple[Message, ...] | None
    token_ids: tuple[int, ...] | None
    sampling: SamplingChoice
    timeout_s: float
    priority: int
    body_hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidRequest:
    """A request that will run as it is: tokenised, within the context, with a seed and a number of tokens."""

    checked: CheckedRequest
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    seed: int


def check_request(
    request: inference.GenerateRequest, model: str, card: ModelCard, limits: Limits, max_token_bytes: int = 1
) -> CheckedRequest:
    """Checks everything that needs no tokenizer.

    Raises InvalidRequest, PromptTooLong or UnknownModel; the message names the field, the value and the range. An empty
    request_id stays empty.
    """
    check_request_id(request.request_id, allow_empty=True)
    check_model(request.model, model)
    text, messages, token_ids = _check_input(request, card, limits, max_token_bytes)
    if not math.isfinite(request.timeout_s) or not 0 <= request.timeout_s <= limits.max_timeout_s:
        raise InvalidRequest(f"timeout_s: {request.timeout_s} is not between 0 (the default) and {limits.max_timeout_s:.0f}")
    if request.n not in (0, 1):
        raise InvalidRequest(f"n: {request.n} completions of one prompt are asked for as requests of their own")
    if request.priority not in (-1, 0, 1):
        raise InvalidRequest(f"priority: {request.priority} is none of -1 (batch), 0 (normal) and 1 (high)")
    return CheckedRequest(
        request_id=request.request_id,
        model=model,
        text=text,
        messages=messages,
        token_ids=token_ids,
        sampling=_check_sampling(request.sampling, card),
        timeout_s=request.timeout_s or limits.default_timeout_s,
        priority=request.priority,
        body_hash=body_hash(request, model),
    )


def fit(
    checked: CheckedRequest, prompt_token_ids: Sequence[int], card: ModelCard, limits: Limits, draw_seed: Callable[[], int]
) -> ValidRequest:
    """Checks that prompt and output fit the context, and fills in what the client left open.

    Without max_tokens the output gets the server's default, or what is left of the context when that is less. Raises
    InvalidRequest for an empty prompt or a minimum above the maximum, PromptTooLong otherwise.
    """
    if not prompt_token_ids:
        raise InvalidRequest("prompt: it has no tokens; send at least one")
    count = len(prompt_token_ids)
    room = card.context_tokens - count
    if room < 1:
        raise PromptTooLong(f"prompt: {count} tokens leave no room to answer in a context of {card.context_tokens}")
    sampling = checked.sampling
    if sampling.max_tokens is not None and sampling.max_tokens > room:
        raise PromptTooLong(
            f"max_tokens: {sampling.max_tokens} and a prompt of {count} tokens exceed the context of {card.context_tokens}; "
            f"at most {room} are left"
        )
    max_tokens = min(limits.default_max_tokens, room) if sampling.max_tokens is None else sampling.max_tokens
    if sampling.min_tokens > max_tokens:
        raise InvalidRequest(f"sampling.min_tokens: {sampling.min_tokens} is above the {max_tokens} of max_tokens")
    seed = draw_seed() if sampling.seed is None else sampling.seed
    return ValidRequest(checked=checked, prompt_token_ids=tuple(prompt_token_ids), max_tokens=max_tokens, seed=seed)


def check_request_id(request_id: str, allow_empty: bool = False) -> None:
    """Raises InvalidRequest for an id that could leave its place in the store."""
    if not (allow_empty and not request_id) and not is_name(request_id):
        raise InvalidRequest(f"request_id: {_shown(request_id)} is not 1 to 64 characters of A-Z a-z 0-9 _ . -")


def check_model(wanted: str, served: str) -> None:
    """Raises UnknownModel unless the name is empty or the one that is served."""
    if wanted and wanted != served:
        raise UnknownModel(f"model: {_shown(wanted)} is not served here; {served!r} is")


def check_text(text: str, card: ModelCard, limits: Limits, max_token_bytes: int) -> None:
    """Raises InvalidRequest for an empty text, PromptTooLong for one that cannot fit whatever its tokens are."""
    if not text:
        raise InvalidRequest("text: it is empty; send at least one character")
    _check_size(len(text.encode()), card, limits, max_token_bytes)


def check_messages(chat: inference.Chat, card: ModelCard, limits: Limits, max_token_bytes: int) -> tuple[Message, ...]:
    """The turns of a chat. Raises InvalidRequest and PromptTooLong."""
    count = len(chat.messages)
    if not 1 <= count <= MAX_MESSAGES:
        raise InvalidRequest(f"chat.messages: {count} messages are not between 1 and {MAX_MESSAGES}")
    messages = tuple(Message(message.role, message.content) for message in chat.messages)
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"chat.messages[{index}].role: {_shown(message.role)} is none of {', '.join(ROLES)}")
    if not any(message.content for message in messages):
        raise InvalidRequest("chat.messages: all of them are empty; send at least one character")
    _check_size(sum(len(message.content.encode()) for message in messages), card, limits, max_token_bytes)
    return messages


def body_hash(request: inference.GenerateRequest, model: str) -> bytes:
    """SHA-256 of the canonical request: two requests of one id are the same when these are equal.

    The id itself and unknown fields do not count; an empty model counts as the one that is served.
    """
    canonical = inference.GenerateRequest()
    canonical.CopyFrom(request)
    canonical.DiscardUnknownFields()  # type: ignore[attr-defined,unused-ignore]
    canonical.request_id = ""
    canonical.model = model
    return hashlib.sha256(canonical.SerializeToString(deterministic=True)).digest()


def _check_input(
    request: inference.GenerateRequest, card: ModelCard, limits: Limits, max_token_bytes: int
) -> tuple[str | None, tuple[Message, ...] | None, tuple[int, ...] | None]:
    match request.WhichOneof("input"):
        case "text":
            check_text(request.text, card, limits, max_token_bytes)
            return request.text, None, None
        case "chat":
            return None, check_messages(request.chat, card, limits, max_token_bytes), None
        case "token_ids":
            return None, None, _check_token_ids(request.token_ids, card)
        case _:
            raise InvalidRequest("input: send one of text, chat and token_ids")


def _check_token_ids(token_ids: inference.TokenIds, card: ModelCard) -> tuple[int, ...]:
    count = len(token_ids.ids)
    if not count:
        raise InvalidRequest("token_ids: the prompt is empty; send at least one token")
    if count >= card.context_tokens:
        raise PromptTooLong(f"token_ids: {count} tokens leave no room to answer in the context of {card.context_tokens}")
    ids = tuple(token_ids.ids)
    _check_vocabulary("token_ids", ids, card)
    return ids


def _check_vocabulary(field: str, ids: Sequence[int], card: ModelCard) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < card.vocab_size):
        index = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < card.vocab_size)
        raise InvalidRequest(f"{field}[{index}]: {ids[index]} is no token id between 0 and {card.vocab_size - 1}")


def _check_size(size_bytes: int, card: ModelCard, limits: Limits, max_token_bytes: int) -> None:
    most = min(limits.max_prompt_bytes, card.context_tokens * max_token_bytes)
    if size_bytes > most:
        raise PromptTooLong(f"prompt: {size_bytes} bytes of text, more than the {most} that can fit the context; shorten it")


def _check_sampling(params: inference.SamplingParams, card: ModelCard) -> SamplingChoice:
    max_tokens = _integer(params, "max_tokens", 1, None)
    if max_tokens is not None and max_tokens >= card.context_tokens:
        raise PromptTooLong(f"max_tokens: {max_tokens} leaves no room for a prompt in the context of {card.context_tokens}")
    min_tokens = _integer(params, "min_tokens", 0, card.context_tokens) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(f"sampling.min_tokens: {min_tokens} is above max_tokens {max_tokens}")
    top_p = _real(params, "top_p", 0.0, 1.0, 1.0)
    if top_p == 0.0:
        raise InvalidRequest("sampling.top_p: 0 would leave no token; it is above 0 and at most 1")
    min_p = _real(params, "min_p", 0.0, 1.0, 0.0)
    if min_p == 1.0:
        raise InvalidRequest("sampling.min_p: 1 is not below 1")
    return SamplingChoice(
        temperature=_real(params, "temperature", 0.0, MAX_TEMPERATURE, 0.0),
        top_p=top_p,
        top_k=_integer(params, "top_k", 0, card.vocab_size) or 0,
        min_p=min_p,
        seed=_integer(params, "seed", 0, MAX_SEED),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=_check_stop_token_ids(params, card),
        stop=_check_stops(params),
        ignore_eos=params.ignore_eos,
        grammar=read_grammar(params),
        logits=check_logit_rules(params, card),
    )


def _check_stop_token_ids(params: inference.SamplingParams, card: ModelCard) -> tuple[int, ...]:
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"sampling.stop_token_ids: {len(params.stop_token_ids)} ids, more than {MAX_STOP_TOKEN_IDS}")
    ids = tuple(params.stop_token_ids)
    _check_vocabulary("sampling.stop_token_ids", ids, card)
    return ids


def _check_stops(params: inference.SamplingParams) -> tuple[str, ...]:
    if len(params.stop) > MAX_STOPS:
        raise InvalidRequest(f"sampling.stop: {len(params.stop)} strings, more than {MAX_STOPS}")
    stops = tuple(params.stop)
    for index, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"sampling.stop[{index}]: {len(stop)} characters are not between 1 and {MAX_STOP_CHARS}")
    return stops


def _real(params: inference.SamplingParams, field: str, least: float, most: float, default: float) -> float:
    if not params.HasField(field):
        return default
    value: float = getattr(params, field)
    if not math.isfinite(value) or not least <= value <= most:
        raise InvalidRequest(f"sampling.{field}: {value} is not between {least:g} and {most:g}")
    return abs(value)  # no negative zero


def _integer(params: inference.SamplingParams, field: str, least: int, most: int | None) -> int | None:
    if not params.HasField(field):
        return None
    value: int = getattr(params, field)
    if value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise InvalidRequest(f"sampling.{field}: {value} is not at least {least}{upper}")
    return value


def _shown(value: str) -> str:
    return repr(value[:_PREVIEW_CHARS]) + ("..." if len(value) > _PREVIEW_CHARS else "")
