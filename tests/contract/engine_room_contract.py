"""The contract of engines: bytes of an import that are put into the pool without a copy, beside `import_kv`, the slow twin."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from protos.contract.errors import BadFrame
from tests.contract.driver import EngineFactory, EngineShape, Expected, assert_empty, prefill, run
from tests.contract.engine_handoff_contract import block_bytes, to_hand_off
from workers.engine_api.memory_views import copy_into
from workers.engine_api.protocol import Engine, KvRoom
from workers.engine_api.types import KvPlace

SHAPE = EngineShape()
TOKENS = 20
MOST_PLACES = 7


def room_of(engine: Engine, *places: KvPlace) -> KvRoom:
    """Room that this process can look into."""
    room = engine.import_room(places)
    assert room is not None
    return room


def pieces_of(engine: Engine, blocks: tuple[int, ...], rng: random.Random) -> list[KvPlace]:
    """Every byte of the blocks once, in runs of random sizes and in random order."""
    found = []
    for block_id in blocks:
        for group in range(engine.layout.num_groups):
            at, total = 0, engine.layout.group_bytes(group)
            while at < total:
                size = rng.randint(1, total - at)
                found.append(KvPlace(block_id, group, at, size))
                at += size
    rng.shuffle(found)
    return found


class RoomContract:
    """What every engine does whose pool its process can look into."""

    @pytest.mark.parametrize("seed", range(3))
    def test_bytes_put_into_the_pool_are_those_that_import_kv_writes(
        self, make_engine: EngineFactory, expected: Expected, seed: int
    ) -> None:
        rng = random.Random(seed)
        source, fast, slow = make_engine(SHAPE), make_engine(SHAPE), make_engine(SHAPE)
        request = to_hand_off(source, TOKENS)
        first = prefill(source, request).tokens
        pinned = source.pin("r", 1)
        tickets = [target.import_begin(request, TOKENS) for target in (fast, slow)]
        assert tickets[0] == tickets[1]
        blocks = tickets[0].block_ids
        sources = dict(zip(blocks, pinned, strict=True))

        def content(place: KvPlace) -> memoryview:
            whole = source.export_kv(sources[place.block_id], place.group).cast("B")
            return whole[place.offset_bytes : place.offset_bytes + place.size_bytes]

        pieces = pieces_of(source, blocks, rng)
        for place in pieces:
            slow.import_kv(place.block_id, place.group, place.offset_bytes, content(place))
        while pieces:
            places = tuple(pieces[: rng.randint(1, MOST_PLACES)])
            del pieces[: len(places)]
            room = room_of(fast, *places)
            assert [view.nbytes for view in room.views] == [place.size_bytes for place in places]
            data = memoryview(b"".join(map(content, places)))
            assert room.write(lambda room=room, data=data: copy_into(room.views, data)) == data.nbytes  # type: ignore[misc]
        for target in (fast, slow):
            target.import_commit("r", 1, tuple(first))
            assert block_bytes(target, target.pin("r", 1)) == block_bytes(source, pinned)
            target.unpin("r", 1)
            assert first + run(target)["r"].tokens == expected(request.prompt, request.sampling)

    def test_a_view_is_where_the_bytes_lie(self, make_engine: EngineFactory) -> None:
        """What is written through it import_kv's view shows, and the other way round."""
        engine = make_engine(SHAPE)
        block_id = engine.import_begin(to_hand_off(engine, TOKENS), TOKENS).block_ids[1]
        group = engine.layout.num_groups - 1
        size = engine.layout.group_bytes(group)
        room = room_of(engine, KvPlace(block_id, group, 8, size - 8))
        shown = engine.import_kv(block_id, group, 8, memoryview(b"\x01" * (size - 8)))
        assert shown is not None and bytes(room.views[0]) == b"\x01" * (size - 8)
        room.write(lambda: copy_into(room.views, memoryview(b"\x02" * 5)))
        assert bytes(shown) == b"\x02" * 5 + b"\x01" * (size - 13)
        assert engine.import_abort("r", 1)
        assert_empty(engine)

    def test_there_is_room_only_where_an_import_is_open(self, make_engine: EngineFactory) -> None:
        engine = make_engine(SHAPE)
        request = to_hand_off(engine, TOKENS)
        prefill(engine, request)
        (victim, *_) = engine.pin("r", 1)
        ticket = engine.import_begin(replace(request, request_id="other"), TOKENS)
        assert ticket.reused_blocks == 2
        mine, size = ticket.block_ids[2], engine.layout.group_bytes(0)
        right = KvPlace(mine, 0, 0, size)
        room_of(engine, right, KvPlace(mine, 0, size - 8, 8))
        for wrong in [
            KvPlace(victim, 0, 0, 8),                        # another sequence's
            KvPlace(ticket.block_ids[0], 0, 0, 8),           # shared
            KvPlace(mine, 0, size - 7, 8),                   # behind the group
            KvPlace(mine, 0, size, 1),
            KvPlace(mine, 0, -8, 8),
            KvPlace(mine, 0, 0, size + 1),
            KvPlace(mine, 0, 0, 2**32),
            KvPlace(mine, engine.layout.num_groups, 0, 8),
            KvPlace(mine, -1, 0, 8),
            KvPlace(SHAPE.num_blocks, 0, 0, 8),
            KvPlace(-1, 0, 0, 8),
        ]:  # fmt: skip
            for places in ((wrong,), (right, wrong), (wrong, right)):
                with pytest.raises(BadFrame):
                    engine.import_room(places)

    @pytest.mark.parametrize("end", ["commit", "abort", "other epoch"])
    def test_a_room_is_shut_when_its_import_ends(self, make_engine: EngineFactory, end: str) -> None:
        source, engine = make_engine(SHAPE), make_engine(SHAPE)
        request = to_hand_off(source, TOKENS)
        prefill(source, request)
        ticket = engine.import_begin(request, TOKENS)
        groups = range(engine.layout.num_groups)
        for block_id, from_id in zip(ticket.block_ids, source.pin("r", 1), strict=True):
            for group in groups:
                data = source.export_kv(from_id, group)
                engine.import_kv(block_id, group, 0, data)
        size = engine.layout.group_bytes(0)
        rooms = [room_of(engine, KvPlace(block_id, 0, 0, size)) for block_id in ticket.block_ids]
        rooms.append(room_of(engine, *(KvPlace(block_id, 0, 0, size) for block_id in ticket.block_ids)))
        if end == "commit":
            engine.import_commit("r", 1, (5,))
        elif end == "abort":
            assert engine.import_abort("r", 1)
        else:
            assert engine.import_abort("r", 1)
            engine.import_begin(replace(request, epoch=2), 1)  # one of the blocks is open again
        before = [bytes(view) for view in rooms[-1].views]
        ran = 0

        def fill() -> int:
            nonlocal ran
            ran += 1
            return 0 if end == "other epoch" else sum(copy_into([view], memoryview(b"late")) for view in rooms[-1].views)

        refused = 0
        for room in rooms:
            try:
                room.write(fill)
            except BadFrame:
                refused += 1
        assert refused == len(rooms) - (end == "other epoch") and ran == (end == "other epoch")
        assert [bytes(view) for view in rooms[-1].views] == before
        assert any(map(any, before)), "it is no empty pool"
