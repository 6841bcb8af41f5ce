"""Matchers alone: replay equals what grew token by token, ends, bad and hostile grammars, the bounded cache."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.contract.errors import AutanError, EngineFailure, InvalidRequest
from protos.contract.grammar import Grammar, deep_executor
from tests.support.grammars import HOSTILE, PHONE, REFUSED, SCHEMA, SUM, json_schema, lark, regex
from workers.engine_api.types import SamplingParams
from workers.engines.torch.tokenizer_files import byte_tokenizer_files
from workers.grammar import matching
from workers.grammar.bits import add, contains, sized, without
from workers.grammar.compiled import CompiledGrammars
from workers.grammar.matching import LlguidanceConstrainer, SequenceMatcher
from workers.grammar.vocabulary import vocabulary_of

VOCAB_SIZE, EOS = 290, 2  # 272 tokens in the file: the last 18 logits belong to no token
FIRST_BYTE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    (out / "tokenizer.json").write_text(json.dumps(byte_tokenizer_files(272, FIRST_BYTE)["tokenizer.json"]))
    return out


@pytest.fixture(scope="module")
def constrainer(folder: Path) -> Iterator[LlguidanceConstrainer]:
    load = vocabulary_of(folder, VOCAB_SIZE, [EOS])
    assert load is not None
    made = LlguidanceConstrainer(load, VOCAB_SIZE, [EOS])
    yield made
    made.close()


def open_(constrainer: LlguidanceConstrainer, grammar: Grammar, **fields: object) -> SequenceMatcher:
    values: dict[str, object] = {"max_tokens": 100, "stop_token_ids": frozenset({EOS}), "grammar": grammar, **fields}
    return constrainer.open(SamplingParams(**values), num_prompt=3)  # type: ignore[arg-type]


def tokens_in(mask: memoryview | None) -> list[int]:
    assert mask is not None
    assert len(mask) == -(-VOCAB_SIZE // 32)
    bits = bytes(mask.cast("B"))
    return [token for token in range(len(bits) * 8) if contains(bits, token)]


def walk(matcher: SequenceMatcher, seed: int, most: int = 120) -> tuple[list[int], list[list[int]]]:
    """A random output that the masks allow, and the mask before each of its tokens."""
    draw = random.Random(seed)
    tokens, masks = [5, 5, 5], []
    while len(tokens) < most:
        masks.append(tokens_in(matcher.follow(tokens)()))
        tokens.append(draw.choice(masks[-1]))
        if tokens[-1] == EOS:
            break
    return tokens, masks


def text_of(tokens: list[int], folder: Path) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens))


@pytest.mark.parametrize("grammar", [json_schema(SCHEMA), regex(PHONE), lark(SUM)], ids=["json", "regex", "lark"])
@pytest.mark.parametrize("seed", range(5))
def test_replay_gives_the_masks_that_grew_token_by_token(
    constrainer: LlguidanceConstrainer, grammar: Grammar, seed: int
) -> None:
    tokens, masks = walk(open_(constrainer, grammar), seed)
    for known in range(3, len(tokens)):
        assert tokens_in(open_(constrainer, grammar).follow(tokens[:known])()) == masks[known - 3]
    jumping = open_(constrainer, grammar)
    for known in sorted(random.Random(seed).sample(range(3, len(tokens)), min(6, len(tokens) - 3))):
        assert tokens_in(jumping.follow(tokens[:known])()) == masks[known - 3]


def test_steps_that_nobody_waited_for_are_not_lost(constrainer: LlguidanceConstrainer) -> None:
    tokens, masks = walk(open_(constrainer, json_schema(SCHEMA)), seed=8)
    hasty = open_(constrainer, json_schema(SCHEMA))
    for known in range(3, len(tokens)):
        allowed = hasty.follow(tokens[:known])
        assert hasty.follow(tokens[:known]) is allowed, "the same tokens are computed once"
    assert tokens_in(allowed()) == masks[-1]


def test_a_complete_output_can_only_end(constrainer: LlguidanceConstrainer, folder: Path) -> None:
    tokens, masks = walk(open_(constrainer, regex(PHONE)), seed=1)
    assert masks[-1] == [EOS] and tokens[-1] == EOS
    assert re.fullmatch(PHONE, text_of(tokens[3:-1], folder))


def test_stop_tokens_end_where_the_grammar_may_end_and_are_text_elsewhere(constrainer: LlguidanceConstrainer) -> None:
    newline, letter = FIRST_BYTE + 100, None
    matcher = open_(constrainer, regex("(ab?)+"), stop_token_ids=frozenset({EOS, newline}))
    first = tokens_in(matcher.follow([5, 5, 5])())
    (letter,) = first
    assert newline not in first and EOS not in first
    assert {newline, EOS, letter} <= set(tokens_in(matcher.follow([5, 5, 5, letter])()))


def test_min_tokens_holds_back_the_end_as_long_as_the_grammar_goes_on(constrainer: LlguidanceConstrainer) -> None:
    tokens, _ = walk(open_(constrainer, regex("a+"), min_tokens=20), seed=4)
    assert len(tokens) - 3 > 20
    tokens, masks = walk(open_(constrainer, regex("aaa"), min_tokens=20), seed=4)
    assert masks[3] == [EOS], "the grammar has precedence"


def test_white_space_of_json_is_bounded(constrainer: LlguidanceConstrainer) -> None:
    blank, newline = tokens_of("\u0120"), tokens_of("\u010a")
    pretty = json.dumps({"name": "a", "age": 1, "mood": "sad", "tags": [True]}, indent=4).encode()
    tokens = [5, 5, 5, *(tokens_of_byte(byte) for byte in pretty), EOS]
    open_(constrainer, json_schema(SCHEMA)).follow(tokens[:-1])()
    tokens = [5, 5, 5, tokens_of("{"), newline]
    for _ in range(45):
        if blank not in tokens_in(open_(constrainer, json_schema(SCHEMA)).follow(tokens)()):
            break
        tokens.append(blank)
    assert len(tokens) == 5 + 40
    assert newline not in tokens_in(open_(constrainer, json_schema(SCHEMA)).follow(tokens)())


def test_tokens_without_text_are_never_allowed(constrainer: LlguidanceConstrainer) -> None:
    allowed = tokens_in(open_(constrainer, regex("(?s:.*)")).follow([5, 5, 5])())
    assert [token for token in allowed if token < FIRST_BYTE or token >= 272] == [EOS]


def test_an_output_that_could_not_end_is_refused(constrainer: LlguidanceConstrainer) -> None:
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        open_(constrainer, regex("a"), stop_token_ids=frozenset({9}))


def test_a_token_outside_of_the_grammar_is_a_fault(constrainer: LlguidanceConstrainer) -> None:
    matcher = open_(constrainer, regex("[0-9]+"))
    with pytest.raises(InvalidRequest, match="output token 0"):
        matcher.follow([5, 5, 5, EOS])()
    assert isinstance(matcher.fault, InvalidRequest)


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_grammar_says_what_is_wrong(constrainer: LlguidanceConstrainer, name: str) -> None:
    grammar, word = REFUSED[name]
    with pytest.raises(InvalidRequest, match=f"grammar.{grammar.kind}") as refused:
        open_(constrainer, grammar).follow([5, 5, 5])()
    assert word in refused.value.message
    assert len(refused.value.message) < 400 and "\n" not in refused.value.message


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_costs_little_and_kills_nothing(constrainer: LlguidanceConstrainer, name: str) -> None:
    matcher = open_(constrainer, HOSTILE[name])
    try:
        tokens, _ = walk(matcher, seed=1, most=40)
        assert len(tokens) > 3
    except AutanError as error:
        assert matcher.fault is error
        assert len(error.message) < 400
    assert tokens_in(open_(constrainer, regex("a")).follow([5, 5, 5])()), "others go on"


def test_a_mask_that_does_not_come_fails_its_sequence_alone(
    constrainer: LlguidanceConstrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "PATIENCE_S", 0.05)
    slow, other = open_(constrainer, regex("a+")), open_(constrainer, regex("a+"))
    with slow._lock:
        started_s = time.monotonic()
        with pytest.raises(EngineFailure, match="too long"):
            slow.follow([5, 5, 5])()
        assert time.monotonic() - started_s < 5
    assert isinstance(slow.fault, EngineFailure)
    assert tokens_in(other.follow([5, 5, 5])())


def test_the_cache_keeps_what_was_used_last(folder: Path) -> None:
    load = vocabulary_of(folder, VOCAB_SIZE, [EOS])
    assert load is not None
    grammars = CompiledGrammars(load, max_kept=3)
    with deep_executor(1, "test") as pool:
        for text in ["a", "b", "a", "c", "a", "d", "a"]:
            pool.submit(grammars.matcher, regex(text)).result()
            assert len(grammars) <= 3
        one, two = (pool.submit(grammars.matcher, regex("a")).result() for _ in range(2))
        assert one.consume_token(tokens_of("a")) and not two.is_stopped(), "matchers of one grammar are independent"
        assert two.consume_token(tokens_of("a"))


def tokens_of(letter: str) -> int:
    tokenizer = byte_tokenizer_files(272, FIRST_BYTE)["tokenizer.json"]
    return int(tokenizer["model"]["vocab"][letter])


def tokens_of_byte(byte: int) -> int:
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [other for other in range(256) if other not in shown]
    return tokens_of(chr(byte) if byte in shown else chr(256 + hidden.index(byte)))


def test_bits_agree_with_sets() -> None:
    draw = random.Random(0)
    for size in [1, 31, 32, 33, 64, 257, 290]:
        members = {token for token in range(size + 40) if draw.random() < 0.5}
        raw = bytearray(-(-(size + 40) // 8))
        add(raw, members)
        bits = sized(bytes(raw), size)
        assert len(bits) == -(-size // 32) * 4
        assert {token for token in range(len(bits) * 8) if contains(bits, token)} == {t for t in members if t < size}
        gone = {token for token in range(size) if draw.random() < 0.3}
        rest = without(bits, gone)
        assert {token for token in range(size) if contains(rest, token)} == {t for t in members - gone if t < size}
