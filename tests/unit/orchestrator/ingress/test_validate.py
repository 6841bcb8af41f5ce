"""The validator: what is refused with which error, and what a request that passes looks like."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.model_card import oracle_card
from orchestrator.ingress.chat import PlainTemplate, encode_chat
from orchestrator.ingress.tokenizer import ByteTokenizer
from orchestrator.ingress.validate import Limits, ValidRequest, body_hash, check_request, fit
from protos.contract.errors import AutanError, RequestError
from protos.wire import inference
from tests.unit.orchestrator.ingress.corpus import BAD, CONTEXT_TOKENS, GOOD, MODEL, VOCAB_SIZE, a_request

CARD = dataclasses.replace(oracle_card(), context_tokens=CONTEXT_TOKENS)
LIMITS = Limits(default_max_tokens=256, default_timeout_s=600.0)
TOKENIZER = ByteTokenizer()


def validate(request: inference.GenerateRequest, seed: int = 7) -> ValidRequest:
    checked = check_request(request, MODEL, CARD, LIMITS, TOKENIZER.max_token_bytes)
    if checked.token_ids is not None:
        ids = list(checked.token_ids)
    elif checked.messages is not None:
        ids = encode_chat(PlainTemplate(), TOKENIZER, checked.messages, 4 * CONTEXT_TOKENS)
    else:
        ids = TOKENIZER.encode(checked.text or "")
    return fit(checked, ids, CARD, LIMITS, lambda: seed)


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_their_error(name: str) -> None:
    request, error = BAD[name]
    with pytest.raises(AutanError) as refused:
        validate(request)
    assert type(refused.value) is error
    assert len(refused.value.message) < 400, "the message quotes no more of the input than a reader needs"


@pytest.mark.parametrize("name", GOOD)
def test_good_requests_pass(name: str) -> None:
    valid = validate(GOOD[name])
    assert 1 <= len(valid.prompt_token_ids) + valid.max_tokens <= CONTEXT_TOKENS


def test_what_is_left_open_gets_the_defaults() -> None:
    valid = validate(inference.GenerateRequest(text="hello"))
    assert valid.prompt_token_ids == tuple(byte + 3 for byte in b"hello")
    assert (valid.max_tokens, valid.seed) == (256, 7)
    assert (valid.checked.timeout_s, valid.checked.priority, valid.checked.model) == (600.0, 0, MODEL)
    sampling = valid.checked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 1.0, 0, 0.0)


def test_the_default_output_shrinks_to_what_fits() -> None:
    assert validate(a_request(text="x" * (CONTEXT_TOKENS - 3))).max_tokens == 3


def test_a_seed_of_zero_is_a_seed() -> None:
    request = a_request()
    request.sampling.seed = 0
    assert validate(request).seed == 0


def test_the_body_hash_ignores_the_id_and_sees_everything_else() -> None:
    base = body_hash(a_request(), MODEL)
    assert body_hash(a_request(request_id="other"), MODEL) == base
    assert body_hash(a_request(model=""), MODEL) == base
    others = [a_request(text="hallo"), a_request(priority=1), a_request(timeout_s=3.0)]
    seeded = a_request()
    seeded.sampling.seed = 0
    assert len({base, *(body_hash(request, MODEL) for request in [*others, seeded])}) == 5


_floats = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 0.5, 1.0])
_ints = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, CONTEXT_TOKENS + 2)


@st.composite
def any_requests(draw: st.DrawFn) -> inference.GenerateRequest:
    request = inference.GenerateRequest(
        request_id=draw(st.text(max_size=70)),
        model=draw(st.sampled_from(["", MODEL, "x"]) | st.text(max_size=5)),
        timeout_s=draw(_floats),
        priority=draw(st.integers(-(2**31), 2**31 - 1) | st.sampled_from([-1, 0, 1])),
    )
    match draw(st.integers(0, 3)):
        case 0:
            request.text = draw(st.text(max_size=600))
        case 1:
            turns = draw(
                st.lists(st.tuples(st.sampled_from(["user", "system", "assistant", "x"]), st.text(max_size=99)), max_size=9)
            )
            request.chat.messages.extend(inference.ChatMessage(role=role, content=content) for role, content in turns)
        case 2:
            request.token_ids.ids.extend(draw(st.lists(st.integers(0, 2**32 - 1) | st.integers(0, VOCAB_SIZE), max_size=600)))
    for field, values in (("temperature", _floats), ("top_p", _floats), ("min_p", _floats), ("top_k", _ints)):
        if draw(st.booleans()):
            setattr(request.sampling, field, draw(values))
    for field in ("max_tokens", "min_tokens"):
        if draw(st.booleans()):
            setattr(request.sampling, field, draw(_ints))
    request.sampling.stop.extend(draw(st.lists(st.text(max_size=300), max_size=18)))
    request.sampling.stop_token_ids.extend(draw(st.lists(_ints, max_size=70)))
    return request


@settings(max_examples=300, deadline=None)
@given(any_requests())
def test_any_message_is_valid_or_an_error_of_the_tree(request: inference.GenerateRequest) -> None:
    try:
        valid = validate(request)
    except RequestError:
        return
    sampling = valid.checked.sampling
    assert len(valid.prompt_token_ids) + valid.max_tokens <= CONTEXT_TOKENS
    assert all(0 <= token_id < VOCAB_SIZE for token_id in (*valid.prompt_token_ids, *sampling.stop_token_ids))
    assert 0 <= sampling.temperature <= 100 and 0 < sampling.top_p <= 1 and 0 <= sampling.min_p < 1
    assert 0 <= sampling.min_tokens <= valid.max_tokens
    assert 0 < valid.checked.timeout_s <= 86_400
