"""The gate into the pool: bounds, and that a write and the closing of its block exclude each other."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.contract.errors import BadFrame
from workers.batching.import_gate import ImportGate
from workers.engine_api.types import KvPlace
from workers.engines.oracle.model import OracleModel
from workers.engines.oracle.runner import OracleRunner

DEADLINE_S = 10.0
BLOCKS, OPEN = 6, frozenset({1, 2, 4})
RUNNER = OracleRunner(OracleModel("m"), num_blocks=BLOCKS, block_tokens=4)
LAYOUT = RUNNER.layout
NEAR = st.integers(-2, LAYOUT.group_bytes(0) + 2)


class BlindRunner(OracleRunner):
    """One whose process cannot look into its pool."""

    def writable_group(self, block_id: int, group: int) -> memoryview | None:
        return None


def a_gate() -> ImportGate:
    gate = ImportGate(RUNNER)
    gate.open(OPEN)
    return gate


@given(st.lists(st.builds(KvPlace, st.integers(-1, BLOCKS), st.integers(-1, LAYOUT.num_groups), NEAR, st.integers(1, 70))))
def test_there_is_room_exactly_where_write_takes_bytes(places: list[KvPlace]) -> None:
    gate, fits = a_gate(), True
    for place in places:
        try:
            gate.write(place.block_id, place.group, place.offset_bytes, memoryview(bytes(place.size_bytes)))
        except BadFrame:
            fits = False
    try:
        room = gate.room(tuple(places))
    except BadFrame:
        assert not fits
        return
    assert fits and room is not None
    assert [view.nbytes for view in room.views] == [place.size_bytes for place in places]
    assert all(not view.readonly for view in room.views)


def test_room_of_one_block_does_not_depend_on_others() -> None:
    gate = a_gate()
    one, both = gate.room((KvPlace(1, 0, 0, 8),)), gate.room((KvPlace(1, 0, 0, 8), KvPlace(2, 0, 0, 8)))
    assert one is not None and both is not None
    gate.close([2])
    assert one.write(lambda: 7) == 7
    with pytest.raises(BadFrame, match="block 2 belongs to no open import"):
        both.write(lambda: pytest.fail("it ran"))
    gate.open([2])
    assert both.write(lambda: 7) == 7
    gate.close(OPEN)
    with pytest.raises(BadFrame):
        one.write(lambda: pytest.fail("it ran"))


def test_a_runner_that_cannot_be_looked_into_has_no_room_but_the_same_bounds() -> None:
    gate = ImportGate(BlindRunner(OracleModel("m"), num_blocks=BLOCKS, block_tokens=4))
    gate.open(OPEN)
    assert gate.room((KvPlace(1, 0, 0, 8),)) is None
    with pytest.raises(BadFrame):
        gate.room((KvPlace(1, LAYOUT.num_groups, 0, 8),))
    with pytest.raises(BadFrame):
        gate.room((KvPlace(1, 0, 0, LAYOUT.group_bytes(0) + 1),))


def test_what_a_fill_raises_comes_out_and_the_gate_goes_on() -> None:
    gate = a_gate()
    room = gate.room((KvPlace(1, 0, 0, 8),))
    assert room is not None

    def broken() -> int:
        raise ConnectionResetError("the peer is gone")

    with pytest.raises(ConnectionResetError):
        room.write(broken)
    assert room.write(lambda: 3) == 3
    gate.close([1])


def test_close_returns_when_the_write_that_is_under_way_is_over() -> None:
    gate = a_gate()
    room = gate.room((KvPlace(1, 0, 0, 8),))
    assert room is not None
    inside, leave, closed = threading.Event(), threading.Event(), threading.Event()
    story: list[str] = []

    def fill() -> int:
        inside.set()
        assert leave.wait(DEADLINE_S)
        story.append("written")
        return 8

    def close() -> None:
        gate.close([1])
        story.append("closed")
        closed.set()

    writer, closer = threading.Thread(target=lambda: room.write(fill)), threading.Thread(target=close)
    writer.start()
    assert inside.wait(DEADLINE_S)
    closer.start()
    assert not closed.wait(0.05)
    leave.set()
    for thread in (writer, closer):
        thread.join(DEADLINE_S)
    assert story == ["written", "closed"]
