"""The contract of engines: pins, exports, imports and whole hand-offs, with bytes moving from engine to engine."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from protos.contract.errors import BadFrame, InvalidRequest, OutOfBlocks, StaleEpoch
from tests.contract.driver import (
    EngineFactory,
    EngineShape,
    Expected,
    a_prompt,
    a_request,
    assert_empty,
    copy_blocks,
    hand_off,
    prefill,
    run,
)
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, Phase, SamplingParams

SHAPE = EngineShape()
SAMPLING = SamplingParams(max_tokens=12, temperature=1.0, seed=11)


def block_bytes(engine: Engine, blocks: tuple[int, ...]) -> list[bytes]:
    """The content of pinned blocks."""
    return [bytes(engine.export_kv(block, group)) for block in blocks for group in range(engine.layout.num_groups)]


def to_hand_off(engine: Engine, length: int = 20, **fields: object) -> EngineRequest:
    request = a_request("r", a_prompt(engine, length), phase=Phase.PREFILL, sampling=SAMPLING)
    return replace(request, **fields)  # type: ignore[arg-type]


class HandOffContract:
    """What every engine does with sequences that come from or go to another worker."""

    @pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 60])
    def test_output_is_the_same_after_a_hand_off(self, make_engine: EngineFactory, expected: Expected, length: int) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        request = to_hand_off(source, length)
        first = prefill(source, request)
        ticket = hand_off(source, target, request, tuple(first.tokens))
        rest = run(target)["r"]
        assert first.tokens + rest.tokens == expected(request.prompt, SAMPLING)
        assert rest.indexes == list(range(1, 12)), "the tokens handed over are not reported again"
        assert ticket.reused_blocks == 0
        stats = target.stats()
        assert (stats.prefill_tokens, stats.decode_tokens) == (0, 11)
        assert_empty(source)
        assert_empty(target)

    def test_blocks_can_be_pushed_while_the_next_chunk_computes(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(replace(SHAPE, max_batch_tokens=5, max_running=2))
        request = to_hand_off(source, 100)
        ticket = target.import_begin(request, 100)
        source.add(request)
        pushed, chunks, tokens = 0, 0, []
        while source.has_work():
            result = source.step()
            blocks = source.pin("r", 1)
            for progress in result.progress:
                chunks += 1
                ready = len(blocks) if progress.computed_tokens == 100 else progress.computed_tokens // 8
                part = replace(ticket, block_ids=ticket.block_ids[:ready], reused_blocks=pushed)
                pushed += copy_blocks(source, blocks, target, part)
            tokens += [t.token_id for t in result.tokens]
        assert (pushed, chunks) == (13, 4)
        target.import_commit("r", 1, tuple(tokens))
        source.unpin("r", 1)
        source.release("r", 1)
        assert tokens + run(target)["r"].tokens == expected(request.prompt, SAMPLING)
        assert_empty(source)
        assert_empty(target)

    def test_many_hand_offs_mix_with_running_sequences(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(replace(SHAPE, num_blocks=40, max_running=4))
        outputs = run(target, [a_request("local", a_prompt(target, 30), sampling=SAMPLING)], steps=1)
        firsts = {}
        for index in range(6):
            request = to_hand_off(source, 5 + 7 * index, request_id=f"r{index}", prompt=a_prompt(source, 5 + 7 * index, index))
            firsts[request] = prefill(source, request).tokens
            hand_off(source, target, request, tuple(firsts[request]))
            outputs.take(target.step())
        for request_id, output in run(target).items():
            outputs[request_id].tokens += output.tokens
        for request, first in firsts.items():
            assert first + outputs[request.request_id].tokens == expected(request.prompt, SAMPLING)
        assert outputs["local"].tokens == expected(a_prompt(target, 30), SAMPLING)
        assert_empty(source)
        assert_empty(target)

    def test_the_target_reuses_its_own_blocks(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        request = to_hand_off(source, 32)
        run(target, [a_request("before", request.prompt[:20], max_tokens=1)])
        first = prefill(source, request)
        ticket = hand_off(source, target, request, tuple(first.tokens))
        assert ticket.reused_blocks == 2
        assert first.tokens + run(target)["r"].tokens == expected(request.prompt, SAMPLING)
        again = replace(request, request_id="again")
        first = prefill(source, again)
        ticket = hand_off(source, target, again, tuple(first.tokens))
        assert ticket.reused_blocks == len(ticket.block_ids) == 4, "no token has to be left: none is computed"
        assert first.tokens + run(target)["again"].tokens == expected(request.prompt, SAMPLING)
        foreign = replace(request, request_id="foreign", cache_salt=b"another tenant")
        assert target.import_begin(foreign, 32).reused_blocks == 0
        assert target.import_abort("foreign", 1)
        assert_empty(target)

    def test_a_continuation_can_be_handed_off(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        whole = expected(a_prompt(source, 20), SAMPLING)
        request = to_hand_off(source, 20, output=tuple(whole[:5]), epoch=7)
        first = prefill(source, request)
        assert (first.tokens, first.indexes) == (whole[5:6], [5])
        hand_off(source, target, request, tuple(first.tokens))
        assert run(target)["r"].tokens == whole[6:]

    def test_rows_that_did_not_come_are_computed(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        request = to_hand_off(source, 20)
        prefill(source, request)
        hand_off(source, target, request, tuple(expected(request.prompt, SAMPLING)[:4]))
        output = run(target)["r"]
        assert output.tokens == expected(request.prompt, SAMPLING)[4:]
        assert output.progress[0].cached_tokens == 16
        assert_empty(target)

    def test_an_imported_sequence_survives_preemption(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(replace(SHAPE, num_blocks=7, prefix_cache=False))
        local = a_request("local", a_prompt(target, 15, 5), sampling=replace(SAMPLING, max_tokens=30))
        outputs = run(target, [local], steps=1)
        requests = [to_hand_off(source, 15, request_id=f"r{i}", prompt=a_prompt(source, 15, i)) for i in range(2)]
        for request in requests:
            outputs[request.request_id].tokens += prefill(source, request).tokens
            hand_off(source, target, request, tuple(outputs[request.request_id].tokens))
        for request_id, output in run(target).items():
            outputs[request_id].tokens += output.tokens
        assert target.stats().preemptions > 0
        for request in (local, *requests):
            assert outputs[request.request_id].tokens == expected(request.prompt, request.sampling)
        assert_empty(target)

    def test_imports_leave_room_for_preempted_sequences(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(replace(SHAPE, num_blocks=4, prefix_cache=False))
        sampling = replace(SAMPLING, max_tokens=20)
        requests = [a_request(f"r{i}", a_prompt(engine, 8, i), sampling=sampling) for i in range(2)]
        outputs = run(engine, requests, steps=1)
        while not engine.stats().preemptions:
            outputs.take(engine.step())
        assert engine.stats().free_blocks == 1
        with pytest.raises(OutOfBlocks):
            engine.import_begin(to_hand_off(engine, 8), 8)
        for request_id, output in run(engine).items():
            outputs[request_id].tokens += output.tokens
        for request in requests:
            assert outputs[request.request_id].tokens == expected(request.prompt, sampling)
        engine.import_begin(to_hand_off(engine, 8), 8)
        engine.import_abort("r", 1)
        assert_empty(engine)

    def test_imports_may_be_committed_in_any_order(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        requests = [to_hand_off(source, 9, request_id=f"r{i}", prompt=a_prompt(source, 9, i)) for i in range(3)]
        firsts = [prefill(source, request).tokens for request in requests]
        tickets = [target.import_begin(request, 9) for request in requests]
        for index in (2, 0, 1):
            copy_blocks(source, source.pin(f"r{index}", 1), target, tickets[index])
            target.import_commit(f"r{index}", 1, tuple(firsts[index]))
            target.check_integrity()
        rest = run(target)
        for request, first in zip(requests, firsts, strict=True):
            assert first + rest[request.request_id].tokens == expected(request.prompt, SAMPLING)

    def test_an_import_does_nothing_before_its_commit(self, make_engine: EngineFactory) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        request = to_hand_off(source, 20)
        prefill(source, request)
        ticket = target.import_begin(request, 20)
        copy_blocks(source, source.pin("r", 1), target, ticket)
        stats = target.stats()
        assert (stats.importing, stats.running, stats.used_blocks, stats.leaked_blocks) == (1, 0, 3, 0)
        assert not target.has_work()
        assert not target.step().tokens
        assert target.import_begin(replace(request, request_id="other"), 20).reused_blocks == 0, "nothing is cached yet"
        assert target.drain_cache_events() == ()
        for request_id in ("r", "other"):
            assert not target.import_abort(request_id, 2)
            assert target.import_abort(request_id, 1)
            assert not target.import_abort(request_id, 1)
        with pytest.raises(StaleEpoch):
            target.import_commit("r", 1, (5,))
        assert target.drain_cache_events() == ()
        assert target.stats().free_blocks == SHAPE.num_blocks
        assert_empty(target)

    def test_bytes_go_only_where_an_import_is_open(self, make_engine: EngineFactory) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        request = to_hand_off(source, 20)
        prefill(source, request)
        hand_off(source, target, request, (5,))
        victim = target.pin("r", 1)
        content = block_bytes(target, victim)
        again = replace(request, request_id="again")
        ticket = target.import_begin(again, 20)
        assert ticket.reused_blocks == 2
        size = target.layout.group_bytes(0)
        for block_id, group, offset, length in [
            (victim[2], 0, 0, 8),                    # another sequence
            (ticket.block_ids[0], 0, 0, 8),          # shared
            (ticket.block_ids[2], 0, size - 7, 8),   # behind the group
            (ticket.block_ids[2], 0, -8, 8),
            (ticket.block_ids[2], 0, 0, size + 1),
            (ticket.block_ids[2], target.layout.num_groups, 0, 8),
            (ticket.block_ids[2], -1, 0, 8),
            (SHAPE.num_blocks, 0, 0, 8),
            (-1, 0, 0, 8),
        ]:  # fmt: skip
            with pytest.raises(BadFrame):
                target.import_kv(block_id, group, offset, memoryview(b"\xff" * length))
        assert target.import_abort("again", 1)
        with pytest.raises(BadFrame):
            target.import_kv(ticket.block_ids[2], 0, 0, memoryview(b"\xff" * 8))
        assert block_bytes(target, victim) == content
        target.unpin("r", 1)
        target.abort("r", 1)
        assert_empty(target)

    def test_imports_are_fenced_by_epoch(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        request = to_hand_off(engine, 20, epoch=3)
        old = engine.import_begin(request, 20)
        for epoch in (2, 3):
            with pytest.raises(StaleEpoch):
                engine.import_begin(replace(request, epoch=epoch), 20)
            with pytest.raises(StaleEpoch):
                engine.add(replace(request, epoch=epoch))
        new = engine.import_begin(replace(request, epoch=4), 20)
        assert engine.stats().importing == 1
        for block_id in set(old.block_ids) - set(new.block_ids):
            with pytest.raises(BadFrame):
                engine.import_kv(block_id, 0, 0, memoryview(b"late"))
        with pytest.raises(StaleEpoch):
            engine.import_commit("r", 3, (5,))
        assert engine.abort("r", 4)
        assert_empty(engine)

    def test_imports_are_checked(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(replace(SHAPE, num_blocks=4))
        request = to_hand_off(engine, 8)
        for rows in (0, -1, 9):
            with pytest.raises(InvalidRequest):
                engine.import_begin(request, rows)
        with pytest.raises(InvalidRequest):
            engine.import_begin(replace(request, prompt=(engine.identity.vocab_size,)), 1)
        with pytest.raises(OutOfBlocks):
            engine.import_begin(replace(request, prompt=(5,) * 22), 22)
        engine.import_begin(request, 8)
        with pytest.raises(OutOfBlocks):
            engine.import_begin(
                replace(request, request_id="other", prompt=(5,) * 30, sampling=SamplingParams(max_tokens=2)), 30
            )
        for tokens in ((), (-1,), (engine.identity.vocab_size,), (5,) * 12):
            with pytest.raises(BadFrame):
                engine.import_commit("r", 1, tokens)
        assert engine.stats().importing == 1, "a refused commit leaves the import open"
        assert engine.import_abort("r", 1)
        assert_empty(engine)

    @pytest.mark.parametrize("how", ["release", "abort"])
    def test_pinned_blocks_outlive_their_sequence(self, make_engine: EngineFactory, how: str) -> None:
        engine = make_engine(replace(SHAPE, num_blocks=6))
        request = to_hand_off(engine, 20)
        prefill(engine, request)
        blocks = engine.pin("r", 1)
        assert engine.pin("r", 1) == blocks, "pinned once, however often asked"
        content = block_bytes(engine, blocks)
        assert engine.release("r", 1) if how == "release" else engine.abort("r", 1)
        stats = engine.stats()
        assert (stats.used_blocks, stats.holding, stats.leaked_blocks) == (3, 0, 0)
        for index in range(4):
            run(engine, [a_request(f"other{index}", a_prompt(engine, 15, index), max_tokens=5)])
        assert block_bytes(engine, blocks) == content
        with pytest.raises(StaleEpoch):
            engine.pin("r", 1)
        engine.unpin("r", 2)
        assert engine.stats().used_blocks == 3
        engine.unpin("r", 1)
        engine.unpin("r", 1)
        with pytest.raises(StaleEpoch):
            engine.export_kv(blocks[0], 0)
        assert_empty(engine)

    def test_unpinning_leaves_the_sequence_its_blocks(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        request = to_hand_off(engine, 20)
        prefill(engine, request)
        engine.pin("r", 1)
        engine.unpin("r", 1)
        assert engine.stats().used_blocks == 3
        assert engine.release("r", 1)
        assert_empty(engine)

    def test_pins_of_two_epochs_are_two_owners(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        request = to_hand_off(engine, 20)
        prefill(engine, request)
        old = engine.pin("r", 1)
        content = block_bytes(engine, old)
        prefill(engine, replace(request, epoch=2))
        new = engine.pin("r", 2)
        assert new[:2] == old[:2], "full blocks come from the prefix cache"
        engine.unpin("r", 2)
        engine.release("r", 2)
        assert block_bytes(engine, old) == content
        engine.unpin("r", 1)
        assert_empty(engine)

    def test_an_aborted_import_keeps_pinned_blocks(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        request = to_hand_off(engine, 20)
        ticket = engine.import_begin(request, 20)
        assert engine.pin("r", 1) == ticket.block_ids
        assert engine.abort("r", 1)
        assert engine.stats().used_blocks == 3
        engine.unpin("r", 1)
        assert_empty(engine)

    def test_bytes_may_move_from_other_threads_during_steps(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        requests = [to_hand_off(source, 40, request_id=f"r{i}", prompt=a_prompt(source, 40, i)) for i in range(4)]
        firsts = [prefill(source, request).tokens for request in requests]
        pins = [source.pin(request.request_id, 1) for request in requests]
        tickets = [target.import_begin(request, 40) for request in requests]
        busy = [a_request("busy", a_prompt(source, 30, 9), sampling=SamplingParams(max_tokens=150))]
        mover_errors: list[BaseException] = []

        def move() -> None:
            try:
                for pinned, ticket in zip(pins, tickets, strict=True):
                    copy_blocks(source, pinned, target, ticket)
                    assert source.stats().leaked_blocks == target.stats().leaked_blocks == 0
            except BaseException as error:
                mover_errors.append(error)

        mover = threading.Thread(target=move)
        mover.start()
        outputs = [run(engine, busy)["busy"].tokens for engine in (source, target)]
        mover.join(timeout=30)
        assert not mover.is_alive()
        assert not mover_errors
        assert outputs[0] == outputs[1] == expected(busy[0].prompt, busy[0].sampling)
        for request, first in zip(requests, firsts, strict=True):
            target.import_commit(request.request_id, 1, tuple(first))
            source.unpin(request.request_id, 1)
            source.release(request.request_id, 1)
        rest = run(target)
        for request, first in zip(requests, firsts, strict=True):
            assert first + rest[request.request_id].tokens == expected(request.prompt, SAMPLING)
        assert_empty(source)
        assert_empty(target)
