"""References into a shared pool against their slow twin, frames that carry the same bytes: equal pools, equal refusals."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from protos.contract.errors import AutanError, BadFrame, DigestMismatch, StaleEpoch
from protos.wire import kv
from tests.support.kv_memory import OpenRoom
from tests.support.push_frames import Part, frames_of, message_of, part, parts_of, with_parts
from workers.engine_api.pool_memory import PoolMemory
from workers.engine_api.types import EngineRequest, ImportTicket, KvLayout, KvPlace, SamplingParams
from workers.kv_transfer.attachment import Attachment
from workers.kv_transfer.claims import Expectation
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.encodings import Encoding
from workers.kv_transfer.frames import Batch, Reassembly
from workers.kv_transfer.kv_source import KvSource
from workers.kv_transfer.lifecycle import ReceiveState
from workers.kv_transfer.packing import GroupUnpacker
from workers.kv_transfer.placement import Placement
from workers.kv_transfer.pool_mappings import PoolMappings, offer_of
from workers.kv_transfer.push_codec import MAX_PARTS, DataFrame, decode_push, encode_data
from workers.kv_transfer.transfer import Transfer

SCOPE = DigestScope("model=x", "r", 1)
BLOCKS = 6
WINDOW_BYTES = 8 * 1024 * 1024
SMALL = KvLayout(block_tokens=4, num_layers=5, row_bytes=8, dtype="bytes", name="test", target_group_bytes=64)
LARGE = KvLayout(block_tokens=64, num_layers=5, row_bytes=1024 + 512, dtype="bytes", name="test", target_group_bytes=192 * 1024)


class Pool:
    """EnginePort over a pool of its own; `shows`: what is written can be looked at."""

    def __init__(self, layout: KvLayout, *, shared: bool = False, shows: bool = True) -> None:
        self.layout = layout
        self.memory = PoolMemory(shared=shared)
        self.bytes = self.memory.allocate(BLOCKS * layout.block_bytes)
        self.shows = shows
        self.before_write: Callable[[], None] = lambda: None

    def _start(self, block_id: int, group: int) -> int:
        return block_id * self.layout.block_bytes + group * self.layout.group_bytes(0)

    def call(self, fn: object) -> asyncio.Future[object]:
        raise NotImplementedError

    def export_kv(self, block_id: int, group: int) -> memoryview:
        start = self._start(block_id, group)
        return self.bytes[start : start + self.layout.group_bytes(group)].data.toreadonly()

    def import_kv(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        self.before_write()
        start = self._start(block_id, group) + offset_bytes
        written = self.bytes[start : start + data.nbytes].data
        written[:] = data
        return written.toreadonly() if self.shows else None

    def import_room(self, places: tuple[KvPlace, ...]) -> OpenRoom | None:
        if not self.shows:
            return None
        starts = [self._start(place.block_id, place.group) + place.offset_bytes for place in places]
        return OpenRoom(
            [self.bytes[at : at + place.size_bytes].data for at, place in zip(starts, places, strict=True)]
        )  # fmt: skip


@pytest.fixture(params=[SMALL, LARGE], ids=["small", "large"])
def source(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """A shared pool of random bytes."""
    pool = Pool(request.param, shared=True)
    pool.bytes[:] = np.frombuffer(random.Random(5).randbytes(len(pool.bytes)), dtype=np.uint8)
    yield pool
    pool.memory.close()


class Arriving:
    """One transfer into a pool of its own; `ids` are the blocks it was given."""

    def __init__(self, source: Pool, ids: Sequence[int], *, mapped: bool, shows: bool = True) -> None:
        layout = source.layout
        request = EngineRequest(request_id="r", epoch=1, prompt=(1,), sampling=SamplingParams(max_tokens=1))
        self.pool, self.counters = Pool(layout, shows=shows), TransferCounters()
        self.placement = Placement(self.pool, self.counters)  # type: ignore[arg-type]
        self.transfer = Transfer(
            expected=Expectation(request=request, source_instance="p", source_incarnation=1),
            ticket=ImportTicket(request_id="r", epoch=1, block_ids=tuple(ids), reused_blocks=0),
            make_reassembly=lambda stream, streams, first: Reassembly(layout, SCOPE, first, len(ids), streams),
            scope=SCOPE,
            make_unpacker=lambda: GroupUnpacker(Encoding.NONE, layout, SCOPE),
            encoding=Encoding.NONE,
            is_exact_source=True,
            window_bytes=WINDOW_BYTES,
            room_tokens=len(ids) * layout.block_tokens,
            touched_s=0.0,
        )
        self.transfer.stripe_over(0, 1)
        self.transfer.begin_again()
        self.transfer.lifecycle.move(ReceiveState.RECEIVING)
        (stripe,) = self.transfer.stripes
        self.at = Attachment(self.transfer, stripe, stripe.attach())
        if mapped:
            offer = offer_of(source.memory.segment)
            assert offer is not None
            self.transfer.pool, _ = PoolMappings(enabled=True, idle_s=1).answer(offer)
            assert self.transfer.pool is not None

    @property
    def verified_blocks(self) -> int:
        """Leading blocks that are verified."""
        return self.at.stripe.reassembly.verified_blocks

    def take(self, message: bytes) -> type[AutanError] | None:
        """The kind of the refusal, None when everything was taken."""

        async def place() -> None:
            await self.placement.place_all(self.at, decode_push(message))

        try:
            asyncio.run(place())
        except AutanError as error:
            return type(error)
        return None


def frames(source: Pool, ids: Sequence[int], *, mapped: bool) -> list[DataFrame]:
    """What a sender makes of these blocks: one frame for each layer group either way."""
    batch = Batch(WINDOW_BYTES // 2, WINDOW_BYTES // 2)
    cut = KvSource(source, SCOPE, Encoding.NONE, source.memory.segment if mapped else None)  # type: ignore[arg-type]

    async def all_frames() -> list[DataFrame]:
        groups = range(source.layout.num_groups)
        found = [cut.whole(index, block, group, batch) for index, block in enumerate(ids) for group in groups]
        assert None not in found, "each fits into one frame"
        return [frame for frame in found if frame is not None]

    return asyncio.run(all_frames())


def messages(cut: Sequence[DataFrame], sizes: Sequence[int]) -> list[bytes]:
    at, made = 0, []
    for size in sizes:
        made.append(encode_data("t", 1, cut[at : at + size]))
        at += size
    assert at == len(cut)
    return made


def sizes_of(rng: random.Random, count: int) -> list[int]:
    sizes = []
    while count:
        sizes.append(min(count, rng.randint(1, MAX_PARTS)))
        count -= sizes[-1]
    return sizes


@pytest.mark.parametrize("shows", [True, False], ids=["in place", "staged"])
@pytest.mark.parametrize("seed", range(4))
def test_references_land_what_frames_with_bytes_land(source: Pool, seed: int, shows: bool) -> None:
    rng = random.Random(seed)
    ids, target = rng.sample(range(BLOCKS), 4), rng.sample(range(BLOCKS), 4)
    slow, fast = Arriving(source, target, mapped=False), Arriving(source, target, mapped=True, shows=shows)
    carried, named = frames(source, ids, mapped=False), frames(source, ids, mapped=True)
    assert all(frame.pool_bytes and not frame.payload for frame in named) and not any(one.pool_bytes for one in carried)
    sizes = sizes_of(rng, len(named))
    carrying, naming = messages(carried, sizes), messages(named, sizes)
    mixed = [rng.choice(pair) for pair in zip(carrying, naming, strict=True)] if seed % 2 else naming
    for one, other in zip(carrying, mixed, strict=True):
        assert slow.take(one) is None and fast.take(other) is None
        assert slow.at.stripe.regrant() == fast.at.stripe.regrant()
        assert slow.verified_blocks == fast.verified_blocks
    assert fast.at.stripe.reassembly.complete
    assert bytes(slow.pool.bytes) == bytes(fast.pool.bytes)
    assert fast.counters.kv_bytes_mapped == sum(head.pool_bytes for message in mixed for head in decode_push(message).heads)
    assert fast.counters.kv_bytes_received == slow.counters.kv_bytes_received
    assert fast.counters.kv_blocks_received == slow.counters.kv_blocks_received == 4


def _damaged(rng: random.Random, cut: list[DataFrame]) -> list[DataFrame]:
    """Frames in another order, twice, missing, or with a field of another place: what either kind of frame can suffer."""
    damaged, at = list(cut), rng.randrange(len(cut) - 1)
    kind = rng.randrange(6)
    if kind == 0:
        damaged[at], damaged[at + 1] = damaged[at + 1], damaged[at]
    elif kind == 1:
        damaged.insert(at, damaged[at])
    elif kind == 2:
        del damaged[at]
    elif kind == 3:
        damaged[at] = damaged[at]._replace(digest=rng.randbytes(16))
    elif kind == 4:
        damaged[at] = damaged[at]._replace(digest=b"")
    else:
        damaged[at] = damaged[at]._replace(block_index=damaged[at].block_index + rng.randint(1, 2**20))
    return damaged


@pytest.mark.parametrize("seed", range(12))
def test_references_are_refused_as_frames_with_bytes_are(source: Pool, seed: int) -> None:
    ids = [3, 0, 5]
    refusals = []
    for mapped in (False, True):
        damaged = _damaged(random.Random(seed), frames(source, ids, mapped=mapped))
        arriving = Arriving(source, [0, 1, 2], mapped=mapped)
        found = [arriving.take(message) for message in messages(damaged, [1] * len(damaged))]
        refusals.append(next((index, one) for index, one in enumerate([*found, BadFrame]) if one is not None))
    assert refusals[0] == refusals[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"pool_offset": 2**64 - 1},
        {"pool_offset": 1 << 40},
        {"pool_bytes": 2**32 - 1},
        {"pool_bytes": 1},
        {"offset_bytes": 8},
        {"digest": b"x" * 15},
    ],
)
def test_hostile_references_write_nothing(source: Pool, changes: dict[str, Any]) -> None:
    honest = kv.PushFrame.FromString(encode_data("t", 1, frames(source, [1, 2], mapped=True)))
    *others, last = parts_of(honest)
    arriving = Arriving(source, [0, 1], mapped=True)
    assert arriving.take(with_parts(honest, [*others, last.saying(**changes)]).SerializeToString()) is BadFrame
    assert not arriving.pool.bytes.any() and not arriving.counters.kv_bytes_received


def test_references_to_another_place_of_the_pool_do_not_verify(source: Pool) -> None:
    first, second = frames(source, [1, 2], mapped=True)[:2]
    swapped = first._replace(pool_offset=second.pool_offset, pool_bytes=first.pool_bytes)
    assert Arriving(source, [0, 1], mapped=True).take(encode_data("t", 1, [swapped])) is DigestMismatch


def test_references_without_a_mapped_pool_are_refused(source: Pool) -> None:
    assert Arriving(source, [0], mapped=False).take(encode_data("t", 1, frames(source, [1], mapped=True))) is BadFrame


def test_references_spend_credit(source: Pool) -> None:
    arriving = Arriving(source, [0], mapped=True)
    arriving.at.stripe.credit = source.layout.group_bytes(0) - 1
    assert arriving.take(encode_data("t", 1, frames(source, [1], mapped=True)[:1])) is BadFrame


@pytest.mark.parametrize("shows", [True, False], ids=["in place", "staged"])
def test_bytes_that_change_on_the_way_do_not_verify(source: Pool, shows: bool) -> None:
    arriving = Arriving(source, [0], mapped=True, shows=shows)
    message = encode_data("t", 1, frames(source, [1], mapped=True))

    def change() -> None:
        source.bytes[source.layout.block_bytes + 3] ^= 1
        arriving.pool.before_write = lambda: None

    arriving.pool.before_write = change
    assert arriving.take(message) is DigestMismatch
    assert arriving.verified_blocks == 0


def test_what_verified_is_the_copy_and_not_the_shared_bytes(source: Pool) -> None:
    """Bytes that change after they were copied do no harm: the digest is of the copy."""
    arriving = Arriving(source, [0], mapped=True)
    before = source.export_kv(1, 0).tobytes()
    taken = encode_data("t", 1, frames(source, [1], mapped=True)[:1])
    written = arriving.pool.import_kv

    def write_then_change(block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        view = written(block_id, group, offset_bytes, data)
        source.bytes[source.layout.block_bytes : source.layout.block_bytes + 16] ^= 255
        return view

    arriving.pool.import_kv = write_then_change  # type: ignore[method-assign]
    assert arriving.take(taken) is None
    assert arriving.pool.export_kv(0, 0).tobytes() == before


def test_nothing_is_written_or_counted_when_the_transfer_ends_meanwhile() -> None:
    source = Pool(LARGE, shared=True)
    arriving = Arriving(source, range(BLOCKS), mapped=True)
    writes = 0
    at_the_end: list[tuple[int, ...]] = []

    def done() -> tuple[int, ...]:
        counted = arriving.counters
        return writes, arriving.verified_blocks, counted.kv_blocks_received, counted.kv_bytes_received, counted.kv_bytes_mapped

    def end() -> None:
        arriving.transfer.ended_by = StaleEpoch("it is over")
        at_the_end.append(done())

    def count() -> None:
        nonlocal writes
        writes += 1
        if writes == 1:
            asyncio.get_running_loop().call_soon(end)

    arriving.pool.before_write = count
    cut = frames(source, range(BLOCKS), mapped=True)
    assert arriving.take(encode_data("t", 1, cut)) is StaleEpoch
    assert 0 < writes < len(cut) and arriving.verified_blocks < BLOCKS
    assert at_the_end == [done()], "nothing more since it ended"
    source.memory.close()


def test_protobuf_and_the_codec_read_each_others_references() -> None:
    rng = random.Random(3)
    for _ in range(200):
        frame = DataFrame(
            rng.getrandbits(32), rng.getrandbits(32), 0, memoryview(b""), rng.randbytes(16),
            pool_offset=rng.getrandbits(64), pool_bytes=rng.getrandbits(31) + 1,
        )  # fmt: skip
        message = encode_data("t", 1, [frame, frame])
        parsed = kv.PushFrame.FromString(message)
        assert [(one.pool_offset, one.pool_bytes) for one in parsed.blocks.parts] == [(frame.pool_offset, frame.pool_bytes)] * 2
        for one in (message, parsed.SerializeToString()):
            assert frames_of(decode_push(one)) == [frame, frame]
        assert frame.size_bytes == frame.pool_bytes


@pytest.mark.parametrize(
    "one",
    [
        part(b"x", pool_bytes=1),
        part(b"x", pool_offset=1),
        part(pool_offset=1),
        part(encoding=1, pool_bytes=1),
        part(pool_bytes=1).beside(b"x"),
    ],
)
def test_a_frame_that_carries_and_names_bytes_is_malformed(one: Part) -> None:
    with pytest.raises(ValueError, match=r"names bytes|names a place|for frames of"):
        decode_push(message_of("t", 1, [one]).SerializeToString())


def test_frames_that_carry_bytes_beside_frames_that_name_them_are_malformed(source: Pool) -> None:
    """And a batch never puts them together: a sender whose engine shows a copy now and then sends them one by one."""
    carried, named = frames(source, [1], mapped=False), frames(source, [1], mapped=True)
    for first, second in ((carried[0], named[1]), (named[0], carried[1])):
        batch = Batch(WINDOW_BYTES, WINDOW_BYTES)
        assert batch.offer(first) and not batch.offer(second) and batch.frames == [first]
        with pytest.raises(ValueError, match="beside"):
            decode_push(encode_data("t", 1, [first, second]))
