"""Whatever happens to KV bytes shows in the tokens; and a runner's failure stays with its sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.contract.driver import EngineShape, Outputs, a_prompt, a_request, assert_empty, run
from tests.contract.test_oracle_engine import MODEL
from workers.batching.paged_engine import EngineLimits, PagedEngine
from workers.batching.runner import OnGroups, Sampled, Slice
from workers.engine_api.types import SamplingParams
from workers.engines.oracle.reference import expected_tokens
from workers.engines.oracle.runner import OracleRunner

SHAPE = EngineShape(num_blocks=40, block_tokens=8, max_batch_tokens=64)
SAMPLING = SamplingParams(max_tokens=24)
Damage = Callable[[OracleRunner, tuple[int, ...], tuple[int, ...]], None]


def block(runner: OracleRunner, block_id: int) -> memoryview:
    return runner.read_block(block_id, 0)


def put(runner: OracleRunner, block_id: int, data: bytes) -> None:
    runner.write_block(block_id, 0, 0, memoryview(data))


def flip(position: int, bit: int) -> Damage:
    def damage(runner: OracleRunner, mine: tuple[int, ...], _other: tuple[int, ...]) -> None:
        data = bytearray(block(runner, mine[position]))
        data[len(data) // 3] ^= 1 << bit
        put(runner, mine[position], bytes(data))

    return damage


def flip_two_top_bits(runner: OracleRunner, mine: tuple[int, ...], _other: tuple[int, ...]) -> None:
    data = bytearray(block(runner, mine[0]))
    data[7] ^= 0x80
    data[15] ^= 0x80
    put(runner, mine[0], bytes(data))


def swap(runner: OracleRunner, mine: tuple[int, ...], _other: tuple[int, ...]) -> None:
    first, second = bytes(block(runner, mine[1])), bytes(block(runner, mine[2]))
    put(runner, mine[1], second)
    put(runner, mine[2], first)


def swap_layers(runner: OracleRunner, mine: tuple[int, ...], _other: tuple[int, ...]) -> None:
    data = bytes(block(runner, mine[1]))
    half = len(data) // 2
    put(runner, mine[1], data[half:] + data[:half])


def missing(runner: OracleRunner, mine: tuple[int, ...], _other: tuple[int, ...]) -> None:
    put(runner, mine[1], bytes(runner.layout.block_bytes))


def stale(runner: OracleRunner, mine: tuple[int, ...], _other: tuple[int, ...]) -> None:
    put(runner, mine[2], bytes(block(runner, mine[1])))


def foreign(runner: OracleRunner, mine: tuple[int, ...], other: tuple[int, ...]) -> None:
    put(runner, mine[1], bytes(block(runner, other[1])))


@pytest.mark.parametrize(
    "damage",
    [flip(0, 0), flip(2, 7), flip(4, 3), flip_two_top_bits, swap, swap_layers, missing, stale, foreign],
    ids=["a bit", "a top bit", "a bit of the last block", "two bits", "swap", "layers", "missing", "stale", "foreign"],
)
def test_damage_changes_what_follows(damage: Damage) -> None:
    differing = 0
    for seed in range(8):
        runner = OracleRunner(MODEL, num_blocks=40, block_tokens=8)
        engine = PagedEngine(runner, EngineLimits(max_batch_tokens=64, max_running=8))
        mine, other = a_prompt(engine, 36, seed), a_prompt(engine, 36, seed + 100)
        requests = [a_request("mine", mine, sampling=SAMPLING), a_request("other", other, sampling=SAMPLING)]
        before = run(engine, requests, steps=4)
        damage(runner, engine.pin("mine", 1), engine.pin("other", 1))
        after = run(engine)
        right = expected_tokens(MODEL, mine, SAMPLING)
        done = len(before["mine"].tokens)
        assert before["mine"].tokens == right[:done]
        assert after["mine"].tokens[:4] != right[done : done + 4]
        assert before["other"].tokens + after["other"].tokens == expected_tokens(MODEL, other, SAMPLING)
        differing += after["mine"].tokens[0] != right[done]
    # One of 53 letters is drawn: the very next token differs but for a coincidence, 1 of 53 times.
    assert differing >= 6


def test_a_damaged_prefix_is_passed_on() -> None:
    """A reused block is read as it is: nothing recomputes it behind the engine's back."""
    runner = OracleRunner(MODEL, num_blocks=40, block_tokens=8)
    engine = PagedEngine(runner, EngineLimits(max_batch_tokens=64, max_running=8))
    prompt = a_prompt(engine, 36)
    run(engine, [a_request("first", prompt)], steps=1)
    missing(runner, engine.pin("first", 1), ())
    engine.unpin("first", 1)
    assert run(engine, [a_request("second", prompt)])["second"].tokens != expected_tokens(MODEL, prompt, SAMPLING)[:8]


class FailingRunner(OracleRunner):
    """Fails the slices that `fails` picks; draws `odd_token` for those of request `odd`."""

    def __init__(self, fails: Callable[[Slice], bool], odd_token: int | None = None) -> None:
        super().__init__(MODEL, num_blocks=SHAPE.num_blocks, block_tokens=SHAPE.block_tokens)
        self._fails = fails
        self._odd_token = odd_token

    def run(self, batch: Sequence[Slice], on_groups: OnGroups | None = None) -> list[Sampled]:
        return [self._spoil(work, drawn) for work, drawn in zip(batch, super().run(batch, on_groups), strict=True)]

    def _spoil(self, work: Slice, drawn: Sampled) -> Sampled:
        if self._fails(work):
            return Sampled(None, "made to fail")
        if work.request_id == "odd" and work.sample:
            return Sampled(self._odd_token)
        return drawn


def run_mates(runner: FailingRunner, bad_id: str) -> Outputs:
    """The bad request among three others; asserts that those are right and that nothing is left behind."""
    engine = PagedEngine(runner, EngineLimits(max_batch_tokens=SHAPE.max_batch_tokens, max_running=8))
    requests = [a_request(f"r{i}", a_prompt(engine, 10 + 9 * i, i), sampling=SAMPLING) for i in range(3)]
    outputs = run(engine, [*requests[:1], a_request(bad_id, a_prompt(engine, 70), sampling=SAMPLING), *requests[1:]])
    for request in requests:
        output = outputs[request.request_id]
        assert (output.failed, output.tokens) == (None, expected_tokens(MODEL, request.prompt, SAMPLING))
    assert_empty(engine)
    assert engine.stats().used_blocks == 0
    return outputs


@pytest.mark.parametrize(
    ("where", "tokens"),
    [(lambda w: w.start == 0, 0), (lambda w: w.sample and w.start < 70, 0), (lambda w: w.start == 75, 6)],
    ids=["first chunk", "last chunk", "decode"],
)
def test_a_failure_stays_with_its_sequence(where: Callable[[Slice], bool], tokens: int) -> None:
    output = run_mates(FailingRunner(lambda work: work.request_id == "bad" and where(work)), "bad")["bad"]
    assert output.failed is not None
    assert output.failed.message == "made to fail"
    assert len(output.tokens) == tokens


@pytest.mark.parametrize("odd_token", [None, -1, 259])
def test_an_impossible_token_fails_its_sequence(odd_token: int | None) -> None:
    output = run_mates(FailingRunner(lambda _: False, odd_token), "odd")["odd"]
    assert output.failed is not None
    assert output.tokens == []


class LostRunner(OracleRunner):
    """A device that is gone while `lost` is set."""

    lost = False

    def run(self, batch: Sequence[Slice], on_groups: OnGroups | None = None) -> list[Sampled]:
        if self.lost:
            raise RuntimeError("device lost")
        return super().run(batch, on_groups)


def test_a_lost_device_leaves_the_books_in_order() -> None:
    runner = LostRunner(MODEL, num_blocks=SHAPE.num_blocks, block_tokens=SHAPE.block_tokens)
    engine = PagedEngine(runner, EngineLimits(max_batch_tokens=64, max_running=8))
    prompt = a_prompt(engine, 21)
    tokens = run(engine, [a_request("r", prompt, sampling=SAMPLING)], steps=4)["r"].tokens
    runner.lost = True
    for _ in range(2):
        with pytest.raises(RuntimeError):
            engine.step()
        engine.check_integrity()
    runner.lost = False
    assert tokens + run(engine)["r"].tokens == expected_tokens(MODEL, prompt, SAMPLING)
    assert_empty(engine)
