"""The contract of engines: cached blocks leave and enter by content, without a sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protos.contract.block_hash import block_hashes, root_hash
from protos.contract.errors import BadFrame, OutOfBlocks, StaleEpoch
from tests.contract.driver import (
    EngineFactory,
    EngineShape,
    Expected,
    a_prompt,
    a_request,
    assert_empty,
    copy_blocks,
    prefill,
    run,
)
from workers.engine_api.protocol import Engine
from workers.engine_api.types import Phase, PrefixTicket, SamplingParams

SHAPE = EngineShape(num_blocks=16)
SAMPLING = SamplingParams(max_tokens=6, temperature=1.0, seed=3)


def root_of(engine: Engine, salt: bytes = b"") -> bytes:
    return root_hash(engine.identity.weights_digest, salt)


def names_of(engine: Engine, prompt: tuple[int, ...], salt: bytes = b"") -> list[bytes]:
    return block_hashes(root_of(engine, salt), prompt, engine.layout.block_tokens)


def copy(source: Engine, lent: PrefixTicket, target: Engine, asked: PrefixTicket, count: int | None = None) -> int:
    """Moves the bytes of the first `count` asked blocks; returns how many."""
    blocks = asked.block_ids[:count]
    for index, block_id in enumerate(blocks, asked.first_block):
        for group in range(source.layout.num_groups):
            target.import_kv(block_id, group, 0, source.export_kv(lent.block_ids[index], group))
    return len(blocks)


class PrefixContract:
    """What every engine does with blocks that come or go by content."""

    def test_an_imported_prefix_is_hit_and_right(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        prompt = a_prompt(source, 44)
        run(source, [a_request("r", prompt, sampling=SAMPLING)])
        names = names_of(source, prompt)
        assert (source.match_prefix(names), target.match_prefix(names)) == (5, 0)
        lent = source.export_prefix(names)
        asked = target.import_prefix_begin(root_of(target), names)
        assert (asked.first_block, len(asked.block_ids)) == (0, 5)
        assert target.match_prefix(names) == 0, "nothing is readable before the commit"
        done = copy(source, lent, target, asked)
        assert target.import_prefix_commit(asked.ticket_id, done) == 5
        assert source.export_prefix_end(lent.ticket_id)
        assert not source.export_prefix_end(lent.ticket_id)
        assert_empty(source)
        assert_empty(target)
        assert [name for event in target.drain_cache_events() for name in event.stored] == names
        output = run(target, [a_request("r", prompt, sampling=SAMPLING)])["r"]
        assert output.tokens == expected(prompt, SAMPLING)
        assert output.progress[0].cached_tokens == 40

    def test_rows_that_are_not_exact_are_never_filed(self, make_engine: EngineFactory, expected: Expected) -> None:
        """Neither what came, nor what is computed on top of it, nor what a pause and a resume leave."""
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        request = a_request("r", a_prompt(source, 30), phase=Phase.PREFILL, sampling=SamplingParams(max_tokens=20))
        first = tuple(prefill(source, request).tokens)
        run(target, [a_request("q", request.prompt[:9], max_tokens=1)])
        blocks = source.pin("r", 1)
        ticket = target.import_begin(request, 30)
        assert ticket.reused_blocks == 1, "exact blocks are shared all the same"
        copy_blocks(source, blocks, target, ticket)
        target.drain_cache_events()
        target.import_commit("r", 1, first, exact=False)
        target.step()
        assert target.pause("r", 1) is not None
        target.unpin("r", 1)
        assert target.resume("r", 1)
        output = run(target)["r"]
        tokens = (*request.prompt, *first, *output.tokens)
        assert len(tokens) - len(request.prompt) >= 19
        assert target.drain_cache_events() == ()
        assert target.match_prefix(names_of(target, tokens)) == 1, "only the block that was computed here"
        assert_empty(target)
        again = run(target, [a_request("s", request.prompt, sampling=SAMPLING)])["s"]
        assert again.tokens == expected(request.prompt, SAMPLING)
        assert again.progress[0].cached_tokens == 8
        source.unpin("r", 1)
        assert source.release("r", 1)

    def test_rows_that_are_computed_again_are_exact(self, make_engine: EngineFactory) -> None:
        """A preempted sequence forgets that its rows came from elsewhere."""
        source, target = make_engine(SHAPE), make_engine(replace(SHAPE, num_blocks=8))
        run(target, [a_request("old", a_prompt(target, 24, 7), max_tokens=1)])
        request = a_request("r", a_prompt(source, 17), phase=Phase.PREFILL, sampling=SamplingParams(max_tokens=24))
        first = tuple(prefill(source, request).tokens)
        target.add(a_request("older", a_prompt(target, 24, 8), max_tokens=30))
        target.step()
        blocks = source.pin("r", 1)
        copy_blocks(source, blocks, target, target.import_begin(request, 17))
        target.import_commit("r", 1, first, exact=False)
        run(target)
        assert target.stats().preemptions > 0, "the case is not the one that is meant"
        assert target.match_prefix(names_of(target, request.prompt)) == 2
        assert_empty(target)

    def test_only_what_is_missing_is_asked_for(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        prompt = a_prompt(source, 40)
        run(source, [a_request("r", prompt, sampling=SAMPLING)])
        run(target, [a_request("r", prompt[:17], max_tokens=1)])
        names = names_of(source, prompt)
        lent, asked = source.export_prefix(names), target.import_prefix_begin(root_of(target), names)
        assert (asked.first_block, len(asked.block_ids)) == (2, 3)
        target.drain_cache_events()
        assert target.import_prefix_commit(asked.ticket_id, copy(source, lent, target, asked, 2)) == 2
        assert target.match_prefix(names) == 4, "the block that did not come is not there"
        (event,) = target.drain_cache_events()
        assert (event.parent, event.stored) == (names[1], tuple(names[2:4]))
        assert run(target, [a_request("r", prompt, sampling=SAMPLING)])["r"].tokens == expected(prompt, SAMPLING)
        again = target.import_prefix_begin(root_of(target), names)
        assert again.block_ids == ()
        assert target.import_prefix_commit(again.ticket_id, 0) == 0
        source.export_prefix_end(lent.ticket_id)
        assert_empty(target)

    def test_lent_and_reserved_blocks_are_not_reused(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        prompt = a_prompt(engine, 40)
        run(engine, [a_request("r", prompt, max_tokens=1)])
        names = names_of(engine, prompt)
        lent = engine.export_prefix(names)
        content = [bytes(engine.export_kv(block, 0)) for block in lent.block_ids]
        asked = engine.import_prefix_begin(root_of(engine), [*names[:2], b"x" * 16])
        assert (asked.first_block, len(asked.block_ids)) == (2, 1)
        engine.check_integrity()
        assert engine.stats().leaked_blocks == 0
        for index in range(5):
            run(engine, [a_request(f"o{index}", a_prompt(engine, 50, index), max_tokens=5)])
        assert [bytes(engine.export_kv(block, 0)) for block in lent.block_ids] == content
        assert engine.import_prefix_abort(asked.ticket_id)
        assert not engine.import_prefix_abort(asked.ticket_id)
        assert engine.export_prefix_end(lent.ticket_id)
        with pytest.raises(StaleEpoch):
            engine.export_kv(lent.block_ids[0], 0)
        with pytest.raises(BadFrame):
            engine.import_kv(asked.block_ids[0], 0, 0, memoryview(b"late"))
        with pytest.raises(StaleEpoch):
            engine.import_prefix_commit(asked.ticket_id, 0)
        assert_empty(engine)

    def test_what_the_pool_has_is_recalled_at_once(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        prompt = a_prompt(engine, 40)
        run(engine, [a_request("r", prompt, max_tokens=1)])
        tickets: list[PrefixTicket] = []
        for wanted, found in ((names_of(engine, prompt), 5), ([], 0), ([b"x" * 16], 0)):
            ticket_id = engine.recall_prefix(wanted, 5.0, tickets.append)
            ticket = tickets.pop()
            assert (ticket.ticket_id, len(ticket.block_ids)) == (ticket_id, found)
            assert engine.stats().used_blocks == found
            assert engine.export_prefix_end(ticket_id)
        assert engine.known_names() >= set(names_of(engine, prompt))
        assert_empty(engine)

    def test_a_name_filed_meanwhile_keeps_its_block(self, make_engine: EngineFactory, expected: Expected) -> None:
        source, target = make_engine(SHAPE), make_engine(SHAPE)
        prompt = a_prompt(source, 30)
        run(source, [a_request("r", prompt, sampling=SAMPLING)])
        names = names_of(source, prompt)
        lent, asked = source.export_prefix(names), target.import_prefix_begin(root_of(target), names)
        assert run(target, [a_request("r", prompt, sampling=SAMPLING)])["r"].tokens == expected(prompt, SAMPLING)
        assert target.import_prefix_commit(asked.ticket_id, copy(source, lent, target, asked)) == 0
        source.export_prefix_end(lent.ticket_id)
        assert_empty(target)

    def test_imports_are_bounded_and_checked(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        names = [bytes([index]) * 16 for index in range(SHAPE.num_blocks + 1)]
        with pytest.raises(OutOfBlocks):
            engine.import_prefix_begin(root_of(engine), names)
        asked = engine.import_prefix_begin(root_of(engine), names[:3])
        for count in (-1, 4):
            with pytest.raises(BadFrame):
                engine.import_prefix_commit(asked.ticket_id, count)
        assert engine.import_prefix_abort(asked.ticket_id)
        assert engine.stats().free_blocks == SHAPE.num_blocks
        assert_empty(engine)

    def test_tenants_share_nothing_and_no_cache_asks_for_nothing(self, make_engine: EngineFactory) -> None:
        engine, plain = make_engine(SHAPE), make_engine(replace(SHAPE, prefix_cache=False))
        prompt = a_prompt(engine, 30)
        run(engine, [a_request("r", prompt, max_tokens=1, salt=b"a")])
        assert engine.match_prefix(names_of(engine, prompt, b"a")) == 3
        assert engine.match_prefix(names_of(engine, prompt, b"b")) == 0
        asked = plain.import_prefix_begin(root_of(plain), names_of(plain, prompt))
        assert asked.block_ids == ()
        assert plain.import_prefix_commit(asked.ticket_id, 0) == 0
        assert plain.export_prefix(names_of(plain, prompt)).block_ids == ()
        assert_empty(plain)
