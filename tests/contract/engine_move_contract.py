"""The contract of engines: a running sequence is paused, resumed, and moved to another engine while it decodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protos.contract.errors import BadFrame, InvalidRequest, StaleEpoch
from tests.contract.driver import (
    EngineFactory,
    EngineShape,
    Expected,
    Output,
    a_prompt,
    a_request,
    assert_empty,
    copy_blocks,
    run,
)
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, Phase, SamplingParams

SHAPE = EngineShape()
SAMPLING = SamplingParams(max_tokens=30, temperature=1.0, seed=11)


def decode(engine: Engine, request: EngineRequest, tokens: int) -> Output:
    """Runs a request until it has so many more tokens."""
    engine.add(request)
    outputs = run(engine, steps=0)
    while len(outputs[request.request_id].tokens) < tokens:
        outputs.take(engine.step())
    return outputs[request.request_id]


def move(source: Engine, target: Engine, known: EngineRequest, ahead: int = 16) -> list[int]:
    """Moves a running sequence of which the target knows `known`; gives the whole output so far."""
    rows = len(known.prompt) + len(known.output)
    ticket = target.import_begin(known, rows, ahead)
    paused = source.pause(known.request_id, 1)
    assert paused is not None and paused.num_tokens == len(known.prompt) + len(paused.output) - 1
    used = -(-paused.num_tokens // source.layout.block_tokens)
    copy_blocks(source, paused.block_ids, target, replace(ticket, block_ids=ticket.block_ids[:used]))
    rest = paused.output[len(known.output) :]
    target.import_commit(known.request_id, known.epoch, rest, paused.num_tokens)
    target.check_integrity()
    source.unpin(known.request_id, 1)
    assert source.release(known.request_id, 1)
    return list(paused.output)


class MoveContract:
    """What every engine does with running sequences that leave for another worker, or come from one."""

    @pytest.mark.parametrize("seen", [0, 1, 3, 7])
    @pytest.mark.parametrize("length", [1, 7, 8, 9, 25])
    def test_a_moved_sequence_goes_on(self, make_engine: EngineFactory, expected: Expected, length: int, seen: int) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        request = a_request("r", a_prompt(source, length), sampling=SAMPLING)
        whole = expected(request.prompt, SAMPLING)
        decode(source, request, 7)
        output = move(source, target, replace(request, epoch=2, output=tuple(whole[:seen])))
        assert output == whole[:7]
        rest = run(target)["r"]
        assert output + rest.tokens == whole and rest.indexes == list(range(7, 30))
        assert target.stats().prefill_tokens == 0, "nothing is computed twice"
        assert_empty(source)
        assert_empty(target)

    def test_a_paused_sequence_goes_on_where_it_was(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(SHAPE)
        request = a_request("r", a_prompt(engine, 20), sampling=SAMPLING)
        output = decode(engine, request, 5)
        paused = engine.pause("r", 1)
        assert paused is not None and list(paused.output) == output.tokens and paused.num_tokens == 24
        assert engine.pause("r", 1) is None and not engine.has_work()
        assert engine.stats().holding == 1
        other = a_request("other", a_prompt(engine, 9, 3), sampling=SAMPLING)
        assert run(engine, [other])["other"].tokens == expected(other.prompt, SAMPLING)
        engine.unpin("r", 1)
        assert engine.resume("r", 1)
        assert not engine.resume("r", 1)
        assert output.tokens + run(engine)["r"].tokens == expected(request.prompt, SAMPLING)
        assert_empty(engine)

    def test_pause_is_for_what_decodes_here(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        request = a_request("r", a_prompt(engine, 20), sampling=SAMPLING)
        with pytest.raises(StaleEpoch):
            engine.pause("r", 1)
        engine.add(request)
        assert engine.pause("r", 1) is None, "it waits"
        with pytest.raises(StaleEpoch):
            engine.pause("r", 2)
        held = replace(request, request_id="held", phase=Phase.PREFILL)
        run(engine, [held], steps=3)
        assert engine.pause("held", 1) is None and not engine.resume("held", 1)
        assert engine.pause("r", 1) is not None
        assert engine.abort("r", 1), "a paused sequence can be dropped"
        assert not engine.resume("r", 1)
        engine.unpin("r", 1)
        engine.release("held", 1)
        assert_empty(engine)

    def test_blocks_travel_while_the_sequence_grows(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        request = a_request("r", a_prompt(source, 20), sampling=SAMPLING)
        whole = expected(request.prompt, SAMPLING)
        decode(source, request, 3)
        known = replace(request, epoch=2, output=tuple(whole[:2]))
        ticket = target.import_begin(known, 22, 27)
        assert len(ticket.block_ids) == 7
        sent = 0
        for _ in range(20):
            rows, blocks = 20 + source.step().tokens[0].index, source.pin("r", 1)
            part = replace(ticket, block_ids=ticket.block_ids[: rows // 8], reused_blocks=sent)
            sent += copy_blocks(source, blocks, target, part)
        assert sent == 5
        paused = source.pause("r", 1)
        assert paused is not None and paused.num_tokens == 42
        copy_blocks(source, paused.block_ids, target, replace(ticket, block_ids=ticket.block_ids[:6], reused_blocks=sent))
        target.import_commit("r", 2, paused.output[2:], 42)
        assert target.stats().used_blocks == 6, "room that was not needed is given back"
        assert list(paused.output) + run(target)["r"].tokens == whole
        source.unpin("r", 1)
        source.release("r", 1)
        assert_empty(source)
        assert_empty(target)

    def test_two_moves_and_the_prefix_cache(self, make_engine: EngineFactory, expected: Expected) -> None:
        first, second = make_engine(SHAPE), make_engine(SHAPE)
        request = a_request("r", a_prompt(first, 30), sampling=SAMPLING)
        whole = expected(request.prompt, SAMPLING)
        decode(first, request, 6)
        output = move(first, second, replace(request, epoch=2, output=tuple(whole[:4])))
        while len(output) < 15:
            output += [token.token_id for token in second.step().tokens]
        # Back to where it came from: what is cached there is not written again.
        known = replace(request, epoch=3, output=tuple(whole[:10]))
        ticket = first.import_begin(known, 40, 16)
        assert ticket.reused_blocks == 4
        paused = second.pause("r", 2)
        assert paused is not None
        copy_blocks(second, paused.block_ids, first, replace(ticket, block_ids=ticket.block_ids[:6]))
        first.import_commit("r", 3, paused.output[10:], paused.num_tokens)
        second.unpin("r", 2)
        second.release("r", 2)
        assert output + run(first)["r"].tokens == whole
        assert_empty(first)
        assert_empty(second)

    def test_room_ahead_is_checked(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        request = a_request("r", a_prompt(engine, 20), sampling=SAMPLING, epoch=2)
        for rows, ahead in ((20, -1), (19, 4), (20, 30)):
            with pytest.raises(InvalidRequest):
                engine.import_begin(request, rows, ahead)
        engine.import_begin(request, 20, 29)
        for tokens, rows in (((5,) * 3, 23), ((5,) * 40, 57), ((5,), 0), ((), 20)):
            with pytest.raises(BadFrame):
                engine.import_commit("r", 2, tokens, rows)
        assert engine.stats().importing == 1
        assert engine.import_abort("r", 2)
        assert_empty(engine)
