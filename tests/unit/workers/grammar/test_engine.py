"""Grammars in the torch engine: a random model obeys only through masks; nothing of a grammar travels with a sequence."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from configs.schema.pools import ModelConfig
from protos.contract.errors import InvalidRequest
from protos.contract.grammar import ANY_OBJECT, Grammar, GrammarKind
from tests.support.grammars import HOSTILE, PHONE, SCHEMA, SUM, SUM_AS_REGEX, json_schema, lark, regex
from tests.support.torch_models import an_engine, collect, hand_off, random_tokens, run_all
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, FinishReason, SamplingParams
from workers.engines.oracle.build import oracle_model
from workers.engines.oracle.runner import OracleRunner
from workers.engines.torch.tiny import write_tiny
from workers.engines.torch.tokenizer_files import byte_tokenizer_files

EOS = 2
MAX_TOKENS = 220
_TEXT_OF = {
    token: text for text, token in byte_tokenizer_files(272, 16)["tokenizer.json"]["model"]["vocab"].items() if token >= 16
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dims = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return write_tiny("llama", tmp_path_factory.mktemp("tiny") / "model", 21, max_position_embeddings=512, **dims)


@pytest.fixture
def engine(folder: Path) -> Engine:
    return an_engine(folder, num_blocks=400, max_batch_tokens=256, max_running=64)


def a_request(name: str, grammar: Grammar | None, seed: int = 0, **fields: Any) -> EngineRequest:
    sampling: dict[str, Any] = {
        "max_tokens": MAX_TOKENS,
        "temperature": 1.0,
        "seed": seed,
        "grammar": grammar,
        "stop_token_ids": frozenset({EOS}),
    }
    extra = {key: fields.pop(key) for key in ("output", "epoch") if key in fields}
    return EngineRequest(
        request_id=name,
        prompt=random_tokens(seed, 20),
        sampling=SamplingParams(**{**sampling, **fields}),
        **{"epoch": 1, **extra},
    )


def text_of(tokens: list[int]) -> str:
    alphabet = {char: byte for byte, char in _bytes_to_chars().items()}
    return bytes(alphabet[char] for token in tokens for char in _TEXT_OF[token]).decode()


def _bytes_to_chars() -> dict[int, str]:
    """The printable stand-ins of byte-level BPE."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {**{byte: chr(byte) for byte in shown}, **{byte: chr(256 + place) for place, byte in enumerate(hidden)}}


def is_person(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


def is_phone(text: str) -> None:
    assert re.fullmatch(PHONE, text)


def is_sum(text: str) -> None:
    assert re.fullmatch(SUM_AS_REGEX, text)


KINDS: dict[str, tuple[Grammar, Callable[[str], None]]] = {
    "json_schema": (json_schema(SCHEMA), is_person),
    "regex": (regex(PHONE), is_phone),
    "lark": (lark(SUM), is_sum),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_model_obeys_every_time(engine: Engine, kind: str) -> None:
    grammar, judge = KINDS[kind]
    requests = [a_request(f"r{seed}", grammar, seed) for seed in range(60)]
    ended = 0
    for name, tokens in run_all(engine, requests).items():
        if tokens[-1] == EOS:
            ended += 1
            judge(text_of(tokens[:-1]))
        else:
            assert len(tokens) == MAX_TOKENS, name
    assert ended >= 50
    engine.check_integrity()


def test_any_object_parses(engine: Engine) -> None:
    requests = [a_request(f"r{seed}", Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT), seed) for seed in range(20)]
    ended = [tokens[:-1] for tokens in run_all(engine, requests).values() if tokens[-1] == EOS]
    assert ended
    assert all(isinstance(json.loads(text_of(tokens)), dict) for tokens in ended)


def test_greedy_obeys_too_and_the_end_is_a_stop(engine: Engine) -> None:
    engine.add(a_request("r", regex(PHONE), temperature=0.0))
    outs = [out for _ in range(40) if engine.has_work() for out in engine.step().tokens]
    assert outs[-1].finish is FinishReason.STOP and outs[-1].token_id == EOS
    is_phone(text_of([out.token_id for out in outs[:-1]]))


def test_max_tokens_cut_an_output_short(engine: Engine) -> None:
    engine.add(a_request("r", regex("a+"), max_tokens=5, min_tokens=5))
    outs = [out for _ in range(10) if engine.has_work() for out in engine.step().tokens]
    assert [out.finish for out in outs] == [None] * 4 + [FinishReason.LENGTH]


def test_an_end_that_the_grammar_forces_ends_before_min_tokens(engine: Engine) -> None:
    engine.add(a_request("r", regex("aaa"), min_tokens=30))
    outs = [out for _ in range(40) if engine.has_work() for out in engine.step().tokens]
    assert len(outs) == 4 and outs[-1].finish is FinishReason.STOP


def test_batch_mates_draw_the_same_tokens(folder: Path) -> None:
    free = [a_request(f"free{seed}", None, seed, max_tokens=40, stop_token_ids=frozenset()) for seed in range(6)]
    bound = [a_request(f"bound{seed}", KINDS[kind][0], seed) for seed, kind in enumerate(KINDS)]
    alone: dict[str, list[int]] = {}
    for one in [*free, *bound]:
        alone |= run_all(an_engine(folder), [one])
    assert run_all(an_engine(folder, num_blocks=400), [*free, *bound]) == alone


@pytest.mark.parametrize("kind", KINDS)
def test_hand_off_changes_no_token(folder: Path, kind: str) -> None:
    for seed in range(3):
        request = a_request("r", KINDS[kind][0], seed)
        whole = run_all(an_engine(folder), [request])["r"]
        assert hand_off(an_engine(folder), an_engine(folder), request) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_anywhere_draws_the_same_rest(folder: Path, kind: str) -> None:
    grammar, seed = KINDS[kind][0], 5
    whole = run_all(an_engine(folder), [a_request("r", grammar, seed)])["r"]
    cuts = range(1, len(whole)) if len(whole) < 40 else range(1, len(whole), 7)
    source, target = an_engine(folder, num_blocks=400), an_engine(folder, num_blocks=400)
    for cut in cuts:
        known = tuple(whole[:cut])
        assert run_all(target, [a_request(f"again{cut}", grammar, seed, output=known)])[f"again{cut}"] == whole[cut:]
        moved = a_request(f"moved{cut}", grammar, seed, output=known)
        assert hand_off(source, target, moved) == whole[cut:]


def test_preemption_changes_no_token(folder: Path) -> None:
    requests = [a_request(f"r{seed}", json_schema(SCHEMA), seed) for seed in range(6)]
    roomy, tight = an_engine(folder, num_blocks=400), an_engine(folder, num_blocks=18)
    assert run_all(tight, requests) == run_all(roomy, requests)
    assert tight.stats().preemptions


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_fails_alone_if_at_all(folder: Path, name: str) -> None:
    engine = an_engine(folder)
    engine.add(a_request("mate", regex(PHONE), 3))
    engine.add(a_request("hostile", HOSTILE[name], 4, max_tokens=30))
    mate: list[int] = []
    for _ in range(400):
        if not engine.has_work():
            break
        result = engine.step()
        mate += [out.token_id for out in result.tokens if out.request_id == "mate"]
        assert all(failed.request_id == "hostile" and failed.blame for failed in result.failed), result.failed
    is_phone(text_of(mate[:-1]))
    engine.check_integrity()
    assert engine.stats().running == engine.stats().used_blocks == 0


def test_a_bad_grammar_fails_with_its_reason(engine: Engine) -> None:
    engine.add(a_request("r", regex("(a")))
    failed = [one for _ in range(5) if engine.has_work() for one in engine.step().failed]
    assert len(failed) == 1 and failed[0].blame and "unclosed group" in failed[0].message


def test_without_an_end_a_grammar_is_refused_and_the_older_epoch_stays(engine: Engine) -> None:
    engine.add(a_request("r", None))
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        engine.add(a_request("r", regex("a"), epoch=2, stop_token_ids=frozenset()))
    assert engine.stats().waiting == 1


def test_the_oracle_refuses_grammars() -> None:
    runner = OracleRunner(oracle_model(ModelConfig(name="o", source="oracle", dtype="float32")), num_blocks=64, block_tokens=16)
    oracle = PagedEngine(runner, EngineLimits(max_batch_tokens=64, max_running=4))
    request = replace(a_request("r", regex("a")), prompt=(5, 6, 7))
    with pytest.raises(InvalidRequest, match="grammar"):
        oracle.add(request)


class _Forward:
    """A decoder that does not come back before the mask of its step is there."""

    def __init__(self, inner: Any, masked: threading.Semaphore) -> None:
        self._inner = inner
        self._masked = masked
        self.overlapped: list[bool] = []

    def forward(self, batch: Any, cache: Any) -> torch.Tensor:
        logits: torch.Tensor = self._inner.forward(batch, cache)
        self.overlapped.append(self._masked.acquire(timeout=10))
        return logits


def test_masks_are_computed_while_the_model_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.grammar.matching import SequenceMatcher

    masked, threads = threading.Semaphore(0), set[str]()
    job = SequenceMatcher._job

    def counted(self: SequenceMatcher) -> bytearray:
        mask = job(self)
        threads.add(threading.current_thread().name)
        masked.release()
        return mask

    monkeypatch.setattr(SequenceMatcher, "_job", counted)
    engine: Any = an_engine(folder)
    probe = _Forward(engine._runner._decoder, masked)
    engine._runner._decoder = probe
    started_s = time.monotonic()
    tokens = run_all(engine, [a_request("r", regex(PHONE))])["r"]
    assert len(probe.overlapped) == len(tokens) and all(probe.overlapped), "a mask waited for the end of its forward pass"
    assert threading.current_thread().name not in threads and time.monotonic() - started_s < 10


def test_an_aborted_sequence_leaves_nothing(engine: Engine) -> None:
    engine.add(a_request("r", json_schema(SCHEMA)))
    engine.step()
    assert engine.abort("r", 1)
    engine.check_integrity()
    assert collect(engine, {}) == {}
