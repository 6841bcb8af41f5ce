"""A real vocabulary: tokens of several bytes, half characters and special tokens, under every kind of grammar."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from protos.contract.grammar import ANY_OBJECT, Grammar, GrammarKind
from tests.support.grammars import PHONE, SCHEMA, SUM, SUM_AS_REGEX, json_schema, lark, regex
from workers.engine_api.types import SamplingParams
from workers.grammar.matching import LlguidanceConstrainer
from workers.grammar.vocabulary import vocabulary_of

VOCAB_SIZE, EOS = 49_152, 2


@pytest.fixture(scope="module")
def constrainer(demo_model_dir: Path) -> Iterator[LlguidanceConstrainer]:
    load = vocabulary_of(demo_model_dir, VOCAB_SIZE, [EOS])
    assert load is not None
    made = LlguidanceConstrainer(load, VOCAB_SIZE, [EOS])
    yield made
    made.close()


def draw_output(constrainer: LlguidanceConstrainer, grammar: Grammar, seed: int, most: int = 150) -> list[int]:
    """Tokens drawn from the masks alone; an end is taken as soon as it is allowed, every other time."""
    draw = random.Random(seed)
    stops = frozenset({EOS})
    matcher = constrainer.open(SamplingParams(max_tokens=most, stop_token_ids=stops, grammar=grammar), num_prompt=0)
    output: list[int] = []
    while len(output) < most:
        mask = matcher.follow(output)()
        assert mask is not None
        bits = int.from_bytes(mask.cast("B"), "little")
        allowed = [token for token, bit in enumerate(reversed(bin(bits)[2:])) if bit == "1"]
        token = EOS if EOS in allowed and draw.random() < 0.5 else draw.choice(allowed)
        if token == EOS:
            return output
        output.append(token)
    return output


@pytest.mark.parametrize("seed", range(12))
def test_random_tokens_of_the_masks_always_fit(constrainer: LlguidanceConstrainer, demo_model_dir: Path, seed: int) -> None:
    tokenizer = Tokenizer.from_file(str(demo_model_dir / "tokenizer.json"))

    def text(grammar: Grammar) -> str:
        return str(tokenizer.decode(draw_output(constrainer, grammar, seed), skip_special_tokens=False))

    person = draw_output(constrainer, json_schema(SCHEMA), seed, most=600)
    jsonschema.validate(_parsed(tokenizer, person), SCHEMA)
    assert re.fullmatch(PHONE, text(regex(PHONE)))
    assert re.fullmatch(SUM_AS_REGEX, text(lark(SUM)))
    anything = draw_output(constrainer, Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT), seed, most=60)
    assert anything and tokenizer.decode(anything).lstrip().startswith("{")


def _parsed(tokenizer: Tokenizer, tokens: list[int]) -> Any:
    return json.loads(tokenizer.decode(tokens, skip_special_tokens=False))
