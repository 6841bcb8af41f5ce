"""Grammars at the door: which are let in, which are refused and why, and that the workers read the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from configs.model_card import oracle_card, read_model_card
from orchestrator.client.messages import generate_request
from orchestrator.ingress import grammar as door
from orchestrator.ingress.grammar import GrammarCheck, read_grammar, to_wire
from orchestrator.ingress.model import load_served_model
from orchestrator.ingress.records import spec_of, stream_of
from orchestrator.ingress.validate import Limits, check_request, fit
from protos.contract.errors import InvalidRequest, UnavailableError
from protos.contract.grammar import ANY_OBJECT, Grammar, GrammarKind
from protos.wire import common, inference
from tests.support.grammars import HOSTILE, PHONE, REFUSED, SCHEMA, SUM, json_schema, lark, regex
from workers.engines.torch.tiny import write_tiny
from workers.service.request_spec import sampling_params

LIMITS = Limits(default_max_tokens=64, default_timeout_s=60.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dims = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "model", 3, **dims)


def a_check(folder: Path) -> GrammarCheck:
    return GrammarCheck(folder, 272, [2])


def checked(check: GrammarCheck, *grammars: Grammar) -> list[str]:
    """What each grammar is refused for; empty where it passes."""

    async def ask() -> list[str]:
        return [await _refusal(check.check(grammar)) for grammar in grammars]

    try:
        return asyncio.run(ask())
    finally:
        check.close()


async def _refusal(work: Coroutine[Any, Any, None]) -> str:
    try:
        await work
    except InvalidRequest as error:
        return error.message
    return ""


def test_good_grammars_pass_and_are_remembered(folder: Path) -> None:
    check = a_check(folder)
    good = [json_schema(SCHEMA), regex(PHONE), lark(SUM), Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT), regex("a|")]
    assert checked(check, *good, *good) == [""] * 10
    assert len(check._known) == 5


@pytest.mark.parametrize("name", REFUSED)
def test_bad_grammars_are_refused_with_their_place(folder: Path, name: str) -> None:
    grammar, word = REFUSED[name]
    params = inference.SamplingParams(grammar=to_wire(grammar))
    try:
        assert read_grammar(params) == grammar
        (message,) = checked(a_check(folder), grammar)
    except InvalidRequest as error:
        message = error.message
    assert message.startswith(f"sampling.grammar.{grammar.kind}: ")
    assert word in message and len(message) < 400


def test_hostile_grammars_leave_the_door_standing(folder: Path) -> None:
    check = a_check(folder)
    refusals = checked(check, *HOSTILE.values(), regex("a"))
    assert refusals[-1] == ""
    assert "no text fits it" in dict(zip(HOSTILE, refusals, strict=False))["endless recursion"]


@pytest.mark.parametrize(
    ("params", "word"),
    [
        (inference.SamplingParams(grammar=common.Grammar()), "empty"),
        (inference.SamplingParams(grammar=common.Grammar(json_object=False)), "json_object"),
        (inference.SamplingParams(grammar=common.Grammar(regex="a"), ignore_eos=True), "ignore_eos"),
        (inference.SamplingParams(grammar=common.Grammar(regex="")), "empty"),
    ],
)
def test_requests_that_make_no_sense_are_refused(params: inference.SamplingParams, word: str) -> None:
    with pytest.raises(InvalidRequest, match="sampling") as refused:
        read_grammar(params)
    assert word in refused.value.message


@pytest.mark.parametrize(
    ("arguments", "grammar"),
    [
        ({"json_schema": {"type": "integer"}}, Grammar(GrammarKind.JSON_SCHEMA, '{"type": "integer"}')),
        ({"json_schema": '{"type":"null"}'}, Grammar(GrammarKind.JSON_SCHEMA, '{"type":"null"}')),
        ({"regex": PHONE}, regex(PHONE)),
        ({"lark": SUM}, lark(SUM)),
        ({"json_object": True}, Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT)),
        ({}, None),
    ],
)
def test_a_grammar_reaches_the_engine_as_it_was_sent(folder: Path, arguments: dict[str, Any], grammar: Grammar | None) -> None:
    card = read_model_card(folder)
    model = load_served_model("tiny", card, folder)
    request = generate_request(token_ids=[20, 21], min_tokens=4, **arguments)
    valid = fit(check_request(request, "tiny", card, LIMITS), [20, 21], card, LIMITS, lambda: 1)
    spec = common.RequestSpec.FromString(spec_of(valid, "r", "t", model).SerializeToString())
    assert sampling_params(spec).grammar == grammar
    stream = stream_of(spec, model)
    assert stream._bounds.min_tokens == (4 if grammar is None else 0), "an end that the grammar forces is an end"


def test_a_busy_check_sends_clients_away_and_a_slow_grammar_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "PATIENCE_S", 0.1)
    over = threading.Event()
    monkeypatch.setattr(door, "_compile", lambda grammar, tokens: over.wait(20))
    check = a_check(folder)

    async def ask() -> list[BaseException | None]:
        return await asyncio.gather(*[check.check(regex(f"a{n}")) for n in range(3)], return_exceptions=True)

    try:
        outcomes = asyncio.run(ask())
        assert [type(one) for one in outcomes] == [InvalidRequest, InvalidRequest, UnavailableError]
        assert not check._known
    finally:
        over.set()
        check.close()


def test_the_client_takes_one_grammar() -> None:
    with pytest.raises(InvalidRequest, match="regex and lark"):
        generate_request("hello", regex="a", lark="start: X")


def test_a_model_without_text_tokens_has_no_check() -> None:
    assert load_served_model("oracle", oracle_card(), None).grammars is None
