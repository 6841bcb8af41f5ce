"""The contract of engines: output, batching, prefix cache, stages. `engine_handoff_contract` has the rest.

Subclass `EngineContract` and give it two fixtures: `make_engine` (an `EngineFactory`) and `expected`, the right output of
that model for a prompt, from a source that does not batch, page or chunk.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from protos.contract.block_hash import block_hashes, root_hash
from protos.contract.errors import InvalidRequest, OutOfBlocks, PromptTooLong, StaleEpoch
from tests.contract.driver import EngineFactory, EngineShape, Expected, a_prompt, a_request, assert_empty, run
from workers.engine_api.protocol import Engine
from workers.engine_api.types import FinishReason, Phase, SamplingParams, StepResult

SHAPE = EngineShape()


class EngineContract:
    """What every engine does with requests of its own."""

    def test_it_is_an_engine(self, make_engine: EngineFactory) -> None:
        engine = make_engine(replace(SHAPE, num_blocks=5, block_tokens=4))
        assert isinstance(engine, Engine)
        assert engine.layout.block_tokens == 4
        assert engine.stats().total_blocks == 5
        assert engine.layout.block_bytes == sum(engine.layout.group_bytes(g) for g in range(engine.layout.num_groups))
        assert_empty(engine)

    @pytest.mark.parametrize("length", [1, 7, 8, 9, 50])
    def test_greedy_output_is_right(self, make_engine: EngineFactory, expected: Expected, length: int) -> None:
        engine = make_engine(SHAPE)
        prompt, sampling = a_prompt(engine, length), SamplingParams(max_tokens=12)
        output = run(engine, [a_request("r", prompt, sampling=sampling)])["r"]
        assert output.tokens == expected(prompt, sampling)
        assert output.indexes == list(range(len(output.tokens)))
        assert output.finish is FinishReason.LENGTH
        assert_empty(engine)

    def test_seeded_output_is_right_and_depends_on_the_seed(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(SHAPE)
        prompt = a_prompt(engine, 20)
        outputs = []
        for seed in (1, 2, 2**63):
            sampling = SamplingParams(max_tokens=12, temperature=5.0, seed=seed)
            outputs.append(run(engine, [a_request(f"r{seed}", prompt, sampling=sampling)])[f"r{seed}"].tokens)
            assert outputs[-1] == expected(prompt, sampling)
        assert outputs[0] != outputs[1] != outputs[2]

    def test_a_stop_token_ends_the_output(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(SHAPE)
        prompt = a_prompt(engine, 20)
        free = expected(prompt, SamplingParams(max_tokens=12))
        sampling = SamplingParams(max_tokens=12, stop_token_ids=frozenset({free[5]}))
        output = run(engine, [a_request("r", prompt, sampling=sampling)])["r"]
        assert output.tokens == free[: free.index(free[5]) + 1]
        assert output.finish is FinishReason.STOP
        assert_empty(engine)

    def test_no_stop_before_min_tokens(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(SHAPE)
        prompt = a_prompt(engine, 20)
        first = expected(prompt, SamplingParams(max_tokens=1))[0]
        sampling = SamplingParams(max_tokens=12, min_tokens=4, stop_token_ids=frozenset({first}))
        output = run(engine, [a_request("r", prompt, sampling=sampling)])["r"]
        assert output.tokens == expected(prompt, sampling)
        assert len(output.tokens) > 4

    def test_a_full_context_ends_the_output(self, make_engine: EngineFactory) -> None:
        engine = make_engine(replace(SHAPE, num_blocks=2 + make_engine(SHAPE).identity.context_tokens // 8))
        context = engine.identity.context_tokens
        if context > 4096:
            pytest.skip(f"a context of {context} tokens takes too long to fill")
        output = run(engine, [a_request("r", a_prompt(engine, context - 3), max_tokens=50)])["r"]
        assert (len(output.tokens), output.finish) == (3, FinishReason.LENGTH)
        assert_empty(engine)

    @pytest.mark.parametrize(
        "shape",
        [
            SHAPE,
            replace(SHAPE, max_batch_tokens=1),
            replace(SHAPE, max_batch_tokens=7, max_running=3, block_tokens=4),
            replace(SHAPE, block_tokens=1, num_blocks=400, max_batch_tokens=100),
            replace(SHAPE, block_tokens=64, num_blocks=12, max_batch_tokens=512, prefix_cache=False),
            replace(SHAPE, num_blocks=11, max_running=16),
        ],
        ids=["plain", "one token a step", "small steps", "blocks of one", "large blocks", "preempting"],
    )
    def test_batching_does_not_change_tokens(self, make_engine: EngineFactory, expected: Expected, shape: EngineShape) -> None:
        engine = make_engine(shape)
        requests = []
        for index, length in enumerate((1, 40, 3, 64, 16, 17, 65, 2)):
            sampling = SamplingParams(max_tokens=1 + 3 * index, temperature=index % 2, seed=index)
            requests.append(a_request(f"r{index}", a_prompt(engine, length, index), sampling=sampling))
        outputs = run(engine, requests)
        for request in requests:
            assert outputs[request.request_id].tokens == expected(request.prompt, request.sampling), request.request_id
        assert_empty(engine)

    def test_a_long_prompt_is_computed_in_chunks(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        progress = run(engine, [a_request("r", a_prompt(engine, 100), max_tokens=2)])["r"].progress
        assert [p.computed_tokens for p in progress] == [32, 64, 96, 100]
        assert [p.chunks for p in progress] == [1, 2, 3, 4]
        assert {p.total_tokens for p in progress} == {100}
        stats = engine.stats()
        assert (stats.prefill_chunks, stats.prefill_tokens, stats.decode_tokens, stats.steps) == (4, 100, 1, 5)

    def test_decodes_short_prompts_and_a_chunk_share_a_step(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        run(engine, [a_request("decoding", a_prompt(engine, 5), max_tokens=20)], steps=1)
        for index in range(3):
            engine.add(a_request(f"short{index}", a_prompt(engine, 4, index), max_tokens=20))
        engine.add(a_request("long", a_prompt(engine, 60), max_tokens=20))
        result = engine.step()
        assert {t.request_id for t in result.tokens} == {"decoding", "short0", "short1", "short2"}
        assert [(p.request_id, p.computed_tokens) for p in result.progress][-1] == ("long", 32 - 1 - 12)
        assert result.batch_tokens == 32
        result = engine.step()
        assert {t.request_id for t in result.tokens} == {"decoding", "short0", "short1", "short2"}, "decodes go first"
        assert [(p.request_id, p.computed_tokens) for p in result.progress] == [("long", 19 + 28)]

    def test_steps_keep_their_bounds(self, make_engine: EngineFactory) -> None:
        engine = make_engine(replace(SHAPE, max_running=3, max_batch_tokens=10))
        for index in range(7):
            engine.add(a_request(f"r{index}", a_prompt(engine, 3 + 2 * index, index), max_tokens=4))
        while engine.has_work():
            result = engine.step()
            assert 0 < result.batch_tokens <= 10
            ids = [t.request_id for t in result.tokens] + [p.request_id for p in result.progress]
            assert len(set(ids)) <= 3
            assert engine.stats().running <= 3
        assert_empty(engine)

    def test_equal_prefixes_are_computed_once(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(SHAPE)
        prompt, sampling = a_prompt(engine, 32), SamplingParams(max_tokens=6)
        run(engine, [a_request("first", prompt, sampling=sampling)])
        longer = prompt + a_prompt(engine, 5, 1)
        outputs = run(
            engine,
            [
                a_request("same", prompt, sampling=sampling),
                a_request("longer", longer, sampling=sampling),
                a_request("foreign", prompt, sampling=sampling, salt=b"another tenant"),
            ],
        )
        assert [p.cached_tokens for p in outputs["same"].progress] == [24], "one token at least is left to compute"
        assert [p.cached_tokens for p in outputs["longer"].progress] == [32]
        assert {p.cached_tokens for p in outputs["foreign"].progress} == {0}
        assert outputs["same"].tokens == outputs["foreign"].tokens == expected(prompt, sampling)
        assert outputs["longer"].tokens == expected(longer, sampling)
        assert engine.stats().prefix_hit_tokens == 24 + 32
        assert_empty(engine)

    def test_generated_tokens_are_cached_too(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(SHAPE)
        prompt, sampling = a_prompt(engine, 12), SamplingParams(max_tokens=9)
        reply = run(engine, [a_request("first turn", prompt, sampling=sampling)])["first turn"].tokens
        second = (*prompt, *reply, *a_prompt(engine, 3))
        output = run(engine, [a_request("second turn", second, sampling=sampling)])["second turn"]
        assert output.progress[0].cached_tokens == 16, "the last token of the reply never got a row"
        assert output.tokens == expected(second, sampling)

    def test_without_prefix_cache_nothing_is_shared(self, make_engine: EngineFactory) -> None:
        engine = make_engine(replace(SHAPE, prefix_cache=False))
        prompt = a_prompt(engine, 32)
        for name in ("first", "second"):
            assert {p.cached_tokens for p in run(engine, [a_request(name, prompt)])[name].progress} == {0}
        assert engine.drain_cache_events() == ()
        assert engine.stats().cached_blocks == 0

    def test_cache_events_tell_what_is_cached(self, make_engine: EngineFactory) -> None:
        engine = make_engine(replace(SHAPE, num_blocks=12))
        known: set[bytes] = set()
        numbers: list[int] = []
        removed = 0
        for index in range(6):
            prompt, salt = a_prompt(engine, 30, index), b"salt%d" % (index % 2)
            run(engine, [a_request(f"r{index}", prompt, max_tokens=1, salt=salt)])
            for event in engine.drain_cache_events():
                numbers.append(event.sequence)
                assert not known & set(event.stored), "stored twice"
                assert known >= set(event.removed), "removed, but never stored"
                known |= set(event.stored)
                known -= set(event.removed)
                removed += len(event.removed)
            names = block_hashes(root_hash(engine.identity.weights_digest, salt), prompt, 8)
            assert len(names) == 3
            assert known >= set(names)
            stats = engine.stats()
            assert len(known) == stats.known_names
            if not stats.host_blocks and not stats.disk_blocks:
                assert stats.known_names == stats.cached_blocks
        assert removed > 0, "the pool was too large for this test"
        assert numbers == list(range(1, len(numbers) + 1))
        assert engine.drain_cache_events() == ()

    def test_a_small_pool_preempts_and_loses_nothing(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(replace(SHAPE, num_blocks=6, block_tokens=4, max_running=6))
        sampling = SamplingParams(max_tokens=18)
        requests = [a_request(f"r{i}", a_prompt(engine, 4, i), sampling=sampling) for i in range(5)]
        outputs = run(engine, requests)
        assert engine.stats().preemptions > 0
        for request in requests:
            output = outputs[request.request_id]
            assert (output.failed, output.indexes) == (None, list(range(18)))
            assert output.tokens == expected(request.prompt, sampling)
        assert_empty(engine)

    @pytest.mark.parametrize(
        ("prompt_tokens", "max_tokens", "fits"), [(32, 1, True), (33, 1, False), (1, 32, True), (1, 33, False)]
    )
    def test_what_could_never_fit_is_refused(
        self, make_engine: EngineFactory, prompt_tokens: int, max_tokens: int, fits: bool
    ) -> None:
        engine = make_engine(replace(SHAPE, num_blocks=4))
        request = a_request("r", a_prompt(engine, prompt_tokens), max_tokens=max_tokens)
        if fits:
            assert len(run(engine, [request])["r"].tokens) == max_tokens
        else:
            with pytest.raises(OutOfBlocks):
                engine.add(request)
        assert_empty(engine)

    def test_wrong_requests_are_refused(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        vocabulary, context = engine.identity.vocab_size, engine.identity.context_tokens
        for prompt, output in [((), ()), ((-1,), ()), ((5, vocabulary), ()), ((5,), (-1,)), ((5,), (5,) * 8)]:
            with pytest.raises(InvalidRequest):
                engine.add(a_request("r", prompt, output=output))
        with pytest.raises(PromptTooLong):
            engine.add(a_request("r", (5,) * context))
        assert_empty(engine)

    def test_only_a_newer_epoch_replaces_a_request(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(SHAPE)
        prompt, sampling = a_prompt(engine, 20), SamplingParams(max_tokens=8)
        run(engine, [a_request("r", prompt, epoch=4)], steps=3)
        for epoch in (3, 4):
            with pytest.raises(StaleEpoch):
                engine.add(a_request("r", prompt, epoch=epoch))
            with pytest.raises(StaleEpoch):
                engine.import_begin(a_request("r", prompt, epoch=epoch), 20)
        engine.add(a_request("r", prompt, epoch=5, sampling=sampling))
        result = engine.step()
        assert [t.epoch for t in result.tokens] + [p.epoch for p in result.progress] == [5, 5]
        tokens = [t.token_id for t in result.tokens] + run(engine)["r"].tokens
        assert tokens == expected(prompt, sampling)
        assert_empty(engine)

    @pytest.mark.parametrize("steps", [0, 1, 4], ids=["waiting", "prefilling", "decoding"])
    def test_abort_in_each_stage(self, make_engine: EngineFactory, expected: Expected, steps: int) -> None:
        engine = make_engine(SHAPE)
        prompt, sampling = a_prompt(engine, 50), SamplingParams(max_tokens=8)
        outputs = run(engine, [a_request("mate", prompt[:9], sampling=sampling), a_request("r", prompt, epoch=3)], steps=steps)
        assert not engine.abort("r", 2), "an older epoch aborts nothing"
        assert engine.abort("r", 3)
        assert not engine.abort("r", 3)
        assert not engine.abort("unknown", 99)
        rest = run(engine)
        assert "r" not in rest
        assert outputs["mate"].tokens + rest["mate"].tokens == expected(prompt[:9], sampling)
        assert_empty(engine)

    @pytest.mark.parametrize("known", [1, 5, 11])
    def test_a_continuation_gives_the_rest(self, make_engine: EngineFactory, expected: Expected, known: int) -> None:
        engine = make_engine(SHAPE)
        prompt, sampling = a_prompt(engine, 19), SamplingParams(max_tokens=12, temperature=1.0, seed=3)
        whole = expected(prompt, sampling)
        output = run(engine, [a_request("r", prompt, output=tuple(whole[:known]), sampling=sampling)])["r"]
        assert output.tokens == whole[known:]
        assert output.indexes == list(range(known, 12))
        assert output.progress[-1].total_tokens == 19 + known

    def test_a_prefilled_sequence_is_held_until_released(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(SHAPE)
        prompt = a_prompt(engine, 20)
        sampling = SamplingParams(max_tokens=8)
        output = run(engine, [a_request("r", prompt, phase=Phase.PREFILL, sampling=sampling)])["r"]
        assert (output.tokens, output.finish) == (expected(prompt, sampling)[:1], None)
        stats = engine.stats()
        assert (stats.holding, stats.running, stats.used_blocks, stats.leaked_blocks) == (1, 0, 3, 0)
        assert not engine.release("r", 2)
        assert engine.release("r", 1)
        assert not engine.release("r", 1)
        assert_empty(engine)

    def test_a_prefilled_sequence_that_ends_is_held_as_well(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        output = run(engine, [a_request("r", a_prompt(engine, 5), max_tokens=1, phase=Phase.PREFILL)])["r"]
        assert output.finish is FinishReason.LENGTH
        assert engine.stats().holding == 1
        assert engine.abort("r", 1)
        assert_empty(engine)

    def test_release_takes_only_what_is_held(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        run(engine, [a_request("r", a_prompt(engine, 50), phase=Phase.PREFILL)], steps=1)
        assert not engine.release("r", 1)
        assert run(engine)["r"].tokens

    def test_sequences_wait_for_blocks_that_others_hold(self, make_engine: EngineFactory, expected: Expected) -> None:
        engine = make_engine(replace(SHAPE, num_blocks=4))
        run(engine, [a_request("held", a_prompt(engine, 20), phase=Phase.PREFILL)])
        prompt, sampling = a_prompt(engine, 6, 1), SamplingParams(max_tokens=15)
        first = run(engine, [a_request("r", prompt, sampling=sampling)])["r"]
        assert first.finish is None, "there is one block for 20 rows"
        assert engine.step() == StepResult()
        assert engine.release("held", 1)
        rest = run(engine)["r"]
        assert first.tokens + rest.tokens == expected(prompt, sampling)
        assert_empty(engine)

    def test_close_twice(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        engine.close()
        engine.close()
