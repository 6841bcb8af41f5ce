"""The planner: order, budgets, admission, preemption; and that it changes nothing."""

from __future__ import annotations

from collections.abc import Sequence as Listing

import pytest

from workers.batching.scheduler import Plan, StepLimits, plan
from workers.batching.sequence import Sequence, SequenceState
from workers.engine_api.types import EngineRequest, SamplingParams

SIZE = 4


class Pool:
    """A pool in which every block of the sequences has as many owners as sequences name it."""

    def __init__(self, available: int, sequences: Listing[Sequence], extra_refs: Listing[int] = ()) -> None:
        self.available = available
        self._owners = [block for sequence in sequences for block in sequence.blocks] + list(extra_refs)

    def ref_count(self, block_id: int) -> int:
        return self._owners.count(block_id)


def a_sequence(name: str, order: int, tokens: int, state: SequenceState, blocks: Listing[int] = ()) -> Sequence:
    request = EngineRequest(request_id=name, epoch=1, prompt=(5,) * tokens, sampling=SamplingParams(max_tokens=99))
    sequence = Sequence(request, order, SIZE, b"", state)
    sequence.blocks = list(blocks)
    if state is SequenceState.DECODING:
        sequence.num_computed = tokens - 1
    return sequence


def waiting(name: str, order: int, tokens: int) -> Sequence:
    return a_sequence(name, order, tokens, SequenceState.WAITING)


def decoding(name: str, order: int, tokens: int, blocks: Listing[int]) -> Sequence:
    return a_sequence(name, order, tokens, SequenceState.DECODING, blocks)


def make_plan(
    queue: Listing[Sequence],
    running: Listing[Sequence],
    *,
    available: int = 100,
    budget: int = 16,
    max_running: int = 8,
    extra_refs: Listing[int] = (),
    hits: Listing[int] = (),
) -> Plan:
    before = [(s.state, s.num_computed, list(s.blocks)) for s in (*queue, *running)]
    pool = Pool(available, running, extra_refs)
    todo = plan(queue, running, pool, StepLimits(budget, max_running), lambda _: hits)
    assert before == [(s.state, s.num_computed, list(s.blocks)) for s in (*queue, *running)]
    assert todo == plan(queue, running, pool, StepLimits(budget, max_running), lambda _: hits)
    return todo


def names(sequences: Listing[Sequence]) -> list[str]:
    return [sequence.request_id for sequence in sequences]


def chunks(todo: Plan) -> list[tuple[str, int]]:
    return [(chunk.sequence.request_id, chunk.count) for chunk in todo.chunks]


def test_nothing_to_do() -> None:
    assert make_plan([], []).empty


def test_decodes_first_then_prompts_in_order_under_the_budget() -> None:
    half = a_sequence("half", 1, 20, SequenceState.PREFILLING, [10, 11, 12, 13, 14])
    half.num_computed = 14
    running = [decoding("d0", 0, 3, [0]), half, decoding("d2", 2, 6, [2, 3])]
    todo = make_plan([waiting("w3", 3, 2), waiting("w4", 4, 50), waiting("w5", 5, 1)], running)
    assert names(todo.decodes) == ["d0", "d2"]
    assert chunks(todo) == [("half", 6), ("w3", 2), ("w4", 6)]
    assert [a.sequence.request_id for a in todo.admit] == ["w3", "w4"]
    assert todo.grow == todo.preempt == ()


def test_a_budget_smaller_than_the_decodes_serves_the_oldest() -> None:
    running = [decoding(f"d{i}", i, 2, [i]) for i in range(5)]
    todo = make_plan([waiting("w", 9, 2)], running, budget=3)
    assert names(todo.decodes) == ["d0", "d1", "d2"]
    assert not todo.admit


def test_max_running_bounds_admission_and_the_step() -> None:
    running = [decoding(f"d{i}", i, 2, [i]) for i in range(2)]
    todo = make_plan([waiting(f"w{i}", 5 + i, 2) for i in range(3)], running, max_running=3)
    assert [a.sequence.request_id for a in todo.admit] == ["w0"]
    assert names(make_plan([], [decoding(f"d{i}", i, 2, [i]) for i in range(5)], max_running=3).decodes) == ["d0", "d1", "d2"]


def test_waiting_sequences_never_overtake() -> None:
    todo = make_plan([waiting("large", 0, 40), waiting("small", 1, 1)], [], available=9, budget=100)
    assert todo.empty
    todo = make_plan([waiting("large", 0, 40), waiting("small", 1, 1)], [], available=10, budget=100)
    assert [a.sequence.request_id for a in todo.admit] == ["large"]


def test_idle_hits_cost_what_they_take_from_the_pool() -> None:
    queue = [waiting("w", 0, 20)]
    assert make_plan(queue, [], available=4, hits=[1, 2]).empty, "two hits come back to use, three blocks are new"
    todo = make_plan(queue, [], available=5, hits=[1, 2])
    assert todo.admit[0].hits == (1, 2)
    assert chunks(todo) == [("w", 12)]
    todo = make_plan(queue, [], available=3, hits=[1, 2], extra_refs=[1, 2])
    assert chunks(todo) == [("w", 12)], "hits that are in use cost nothing"


def test_idle_hits_of_two_sequences_come_back_once() -> None:
    queue = [waiting("a", 0, 12), waiting("b", 1, 12)]
    for available, admitted in [(3, 1), (4, 1), (5, 2)]:  # 2 hits + 1 block for a, 1 block for b, 1 spare
        todo = make_plan(queue, [], available=available, hits=[1, 2])
        assert len(todo.admit) == admitted


def test_a_decode_without_a_block_preempts_the_youngest() -> None:
    old, middle = decoding("old", 0, 5, [0]), decoding("middle", 1, 3, [1])
    young = decoding("young", 2, 15, [2, 3, 4, 5])
    todo = make_plan([waiting("w", 3, 1)], [old, middle, young], available=0)
    assert names(todo.preempt) == ["young"]
    assert names(todo.grow) == ["old"]
    assert names(todo.decodes) == ["old", "middle"]
    assert not todo.admit, "nothing starts in a step that preempts"


def test_preemption_goes_on_until_a_block_comes_free() -> None:
    old, a, b = decoding("old", 0, 5, [0]), decoding("a", 1, 3, [7]), decoding("b", 2, 3, [7])
    assert names(make_plan([], [old, a, b], available=0).preempt) == ["a", "b"], "they share their only block"
    todo = make_plan([], [old, a, b], available=0, extra_refs=[7])
    assert todo.preempt == (), "nothing would come free: the block is pinned"
    assert names(todo.decodes) == ["a", "b"], "the old one sits out, the others go on"


def test_the_youngest_never_preempts_an_older_one() -> None:
    todo = make_plan([], [decoding("old", 0, 3, [0]), decoding("young", 1, 5, [1])], available=0)
    assert names(todo.decodes) == ["old"]
    assert todo.preempt == ()
    assert make_plan([], [decoding("alone", 0, 5, [0])], available=0).empty


def test_several_decodes_share_what_preemption_frees() -> None:
    running = [decoding("a", 0, 5, [0]), decoding("b", 1, 5, [1]), decoding("c", 2, 9, [2, 3])]
    todo = make_plan([], running, available=0)
    assert (names(todo.grow), names(todo.preempt)) == (["a", "b"], ["c"])


@pytest.mark.parametrize(("running", "spare"), [(0, 0), (1, 1), (8, 1), (9, 2)])
def test_admission_leaves_spare_blocks_for_those_that_run(running: int, spare: int) -> None:
    mates = [decoding(f"d{i}", i, 2, [i]) for i in range(running)]
    assert not make_plan([waiting("w", 99, 8)], mates, available=1 + spare, max_running=99).admit
    assert make_plan([waiting("w", 99, 8)], mates, available=2 + spare, max_running=99).admit
