"""Requests that must be refused, each with its error: the same corpus goes through the validator and through the server."""

from __future__ import annotations

from collections.abc import Callable

from protos.contract.errors import AutanError, InvalidRequest, PromptTooLong, UnknownModel
from protos.wire import inference

MODEL = "oracle"
CONTEXT_TOKENS = 512
VOCAB_SIZE = 259

Build = Callable[[inference.GenerateRequest], None]


def a_request(**fields: object) -> inference.GenerateRequest:
    """A request that is right, with some fields replaced."""
    request = inference.GenerateRequest(request_id="r-1", model=MODEL, text="hello")
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def _with(change: Build) -> inference.GenerateRequest:
    request = a_request()
    change(request)
    return request


def _sampling(**fields: object) -> inference.GenerateRequest:
    request = a_request()
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(request.sampling, name).extend(value)
        else:
            setattr(request.sampling, name, value)
    return request


def _bias(entries: dict[int, float]) -> inference.GenerateRequest:
    request = a_request()
    request.sampling.logit_bias.update(entries)
    return request


def _chat(*turns: tuple[str, str]) -> inference.GenerateRequest:
    messages = [inference.ChatMessage(role=role, content=content) for role, content in turns]
    return inference.GenerateRequest(request_id="r-1", chat=inference.Chat(messages=messages))


def _ids(*ids: int) -> inference.GenerateRequest:
    return inference.GenerateRequest(request_id="r-1", token_ids=inference.TokenIds(ids=ids))


BAD: dict[str, tuple[inference.GenerateRequest, type[AutanError]]] = {
    "no input": (_with(lambda r: r.ClearField("text")), InvalidRequest),
    "empty text": (a_request(text=""), InvalidRequest),
    "empty token list": (_ids(), InvalidRequest),
    "empty chat": (_chat(), InvalidRequest),
    "chat without content": (_chat(("user", ""), ("assistant", "")), InvalidRequest),
    "unknown role": (_chat(("root", "hello")), InvalidRequest),
    "role with NUL": (_chat(("user\0", "hello")), InvalidRequest),
    "too many messages": (_chat(*[("user", "x")] * 1025), InvalidRequest),
    "chat beyond the context": (_chat(("user", "x" * CONTEXT_TOKENS)), PromptTooLong),
    "text of the whole context": (a_request(text="x" * CONTEXT_TOKENS), PromptTooLong),
    "text beyond the context": (a_request(text="x" * (CONTEXT_TOKENS + 1)), PromptTooLong),
    "text far beyond the context": (a_request(text="x" * 2_000_000), PromptTooLong),
    "ids of the whole context": (_ids(*[5] * CONTEXT_TOKENS), PromptTooLong),
    "a million ids": (_ids(*[5] * 1_000_000), PromptTooLong),
    "first id outside": (_ids(VOCAB_SIZE), InvalidRequest),
    "largest id": (_ids(4, 2**32 - 1), InvalidRequest),
    "unknown model": (a_request(model="gpt"), UnknownModel),
    "model of 10 KB": (a_request(model="m" * 10_000), UnknownModel),
    "id with braces": (a_request(request_id="{x}"), InvalidRequest),
    "id with colon": (a_request(request_id="a:b"), InvalidRequest),
    "id with NUL": (a_request(request_id="a\0"), InvalidRequest),
    "id with newline": (a_request(request_id="a\n"), InvalidRequest),
    "id in Unicode": (a_request(request_id="änderung"), InvalidRequest),
    "id of 65": (a_request(request_id="x" * 65), InvalidRequest),
    "id of 10 KB": (a_request(request_id="x" * 10_000), InvalidRequest),
    "negative timeout": (a_request(timeout_s=-1.0), InvalidRequest),
    "endless timeout": (a_request(timeout_s=float("inf")), InvalidRequest),
    "timeout NaN": (a_request(timeout_s=float("nan")), InvalidRequest),
    "timeout of two days": (a_request(timeout_s=172_800.0), InvalidRequest),
    "priority 2": (a_request(priority=2), InvalidRequest),
    "priority -2": (a_request(priority=-2), InvalidRequest),
    "least priority": (a_request(priority=-(2**31)), InvalidRequest),
    "temperature NaN": (_sampling(temperature=float("nan")), InvalidRequest),
    "temperature inf": (_sampling(temperature=float("inf")), InvalidRequest),
    "temperature -inf": (_sampling(temperature=float("-inf")), InvalidRequest),
    "temperature negative": (_sampling(temperature=-0.1), InvalidRequest),
    "temperature huge": (_sampling(temperature=1e300), InvalidRequest),
    "top_p 0": (_sampling(top_p=0.0), InvalidRequest),
    "top_p above 1": (_sampling(top_p=1.0000001), InvalidRequest),
    "top_p NaN": (_sampling(top_p=float("nan")), InvalidRequest),
    "top_k negative": (_sampling(top_k=-1), InvalidRequest),
    "top_k huge": (_sampling(top_k=2**62), InvalidRequest),
    "min_p 1": (_sampling(min_p=1.0), InvalidRequest),
    "repetition_penalty 0": (_sampling(repetition_penalty=0.0), InvalidRequest),
    "repetition_penalty NaN": (_sampling(repetition_penalty=float("nan")), InvalidRequest),
    "presence_penalty beyond 2": (_sampling(presence_penalty=2.1), InvalidRequest),
    "frequency_penalty infinite": (_sampling(frequency_penalty=float("-inf")), InvalidRequest),
    "logprobs 21": (_sampling(logprobs=21), InvalidRequest),
    "logprobs -1": (_sampling(logprobs=-1), InvalidRequest),
    "logprobs of a model without logits": (_sampling(logprobs=1), InvalidRequest),
    "penalty of a model without logits": (_sampling(repetition_penalty=1.5), InvalidRequest),
    "logit_bias outside the vocabulary": (_bias({VOCAB_SIZE: 1.0}), InvalidRequest),
    "logit_bias of a negative id": (_bias({-1: 1.0}), InvalidRequest),
    "logit_bias beyond 100": (_bias({5: 100.5}), InvalidRequest),
    "logit_bias NaN": (_bias({5: float("nan")}), InvalidRequest),
    "too much logit_bias": (_bias(dict.fromkeys(range(1025), 1.0)), InvalidRequest),
    "n 17": (a_request(n=17), InvalidRequest),
    "min_p NaN": (_sampling(min_p=float("nan")), InvalidRequest),
    "max_tokens 0": (_sampling(max_tokens=0), InvalidRequest),
    "max_tokens -1": (_sampling(max_tokens=-1), InvalidRequest),
    "max_tokens least": (_sampling(max_tokens=-(2**63)), InvalidRequest),
    "max_tokens beyond the context": (_sampling(max_tokens=CONTEXT_TOKENS), PromptTooLong),
    "max_tokens 2**31": (_sampling(max_tokens=2**31), PromptTooLong),
    "max_tokens 2**63-1": (_sampling(max_tokens=2**63 - 1), PromptTooLong),
    "prompt and max_tokens one too many": (_sampling(max_tokens=CONTEXT_TOKENS - 4), PromptTooLong),
    "min_tokens negative": (_sampling(min_tokens=-1), InvalidRequest),
    "min_tokens above max_tokens": (_sampling(min_tokens=9, max_tokens=8), InvalidRequest),
    "min_tokens above the default": (_sampling(min_tokens=300), InvalidRequest),
    "stop id negative": (_sampling(stop_token_ids=[-1]), InvalidRequest),
    "stop id outside": (_sampling(stop_token_ids=[VOCAB_SIZE]), InvalidRequest),
    "stop id 2**62": (_sampling(stop_token_ids=[2**62]), InvalidRequest),
    "65 stop ids": (_sampling(stop_token_ids=[3] * 65), InvalidRequest),
    "a million stop ids": (_sampling(stop_token_ids=[3] * 1_000_000), InvalidRequest),
    "17 stop strings": (_sampling(stop=["x"] * 17), InvalidRequest),
    "empty stop string": (_sampling(stop=[""]), InvalidRequest),
    "stop string of 257": (_sampling(stop=["x" * 257]), InvalidRequest),
    "200,000 stop strings": (_sampling(stop=["x"] * 200_000), InvalidRequest),
}

GOOD: dict[str, inference.GenerateRequest] = {
    "text": a_request(),
    "no model, no id": inference.GenerateRequest(text="hello"),
    "chat": _chat(("system", "be brief"), ("user", "hello")),
    "token ids": _ids(1, 5, 258),
    "longest prompt": _ids(*[5] * (CONTEXT_TOKENS - 1)),
    "longest output": _sampling(max_tokens=CONTEXT_TOKENS - 5),
    "text with NUL and emoji": a_request(text="a\0b \N{GRINNING FACE}"),
    "every limit at its edge": _sampling(
        temperature=100.0,
        top_p=1.0,
        top_k=VOCAB_SIZE,
        min_p=0.0,
        seed=2**64 - 1,
        max_tokens=1,
        min_tokens=1,
        stop_token_ids=[0, VOCAB_SIZE - 1] * 32,
        stop=["x" * 256] * 16,
        ignore_eos=True,
    ),
}
