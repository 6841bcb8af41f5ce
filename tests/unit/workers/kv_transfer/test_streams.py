"""A receiver under several streams at once, driven message by message in seeded random orders.

The slow twin is the content itself: what is committed is byte for byte what was cut, whatever the order, the cuts in between
and the number of streams; what was changed is never committed and keeps nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import pytest

from protos.contract.errors import StaleEpoch
from protos.contract.redis_names import pack_tokens
from protos.wire import fingerprint_key, kv
from tests.support.kv_memory import BLOCK_TOKENS, FINGERPRINT, Hooks, MemoryPool, request_of
from tests.support.push_frames import frames_of, push_message
from tests.support.worker_world import until
from workers.engine_api.types import KvLayout
from workers.kv_transfer.block_names import sequence_hashes
from workers.kv_transfer.counters import TransferCounters
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.frames import split
from workers.kv_transfer.hooks import ReceiveLimits
from workers.kv_transfer.ledger import Ledger
from workers.kv_transfer.push_codec import DataFrame, PushMessage
from workers.kv_transfer.receiver import Receiver
from workers.kv_transfer.striping import first_at

LAYOUT = KvLayout(block_tokens=BLOCK_TOKENS, num_layers=3, row_bytes=2, dtype="bytes", name="m", target_group_bytes=256)
SCOPE = DigestScope(fingerprint_key(FINGERPRINT), "r", 1)


@dataclass
class Side:
    """A receiver with room for `blocks`, of which `reused` are there, and the content that it is to get."""

    blocks: int
    reused: int = 0
    most_streams: int = 8
    timeout_s: float = 5.0
    seed: int = 0
    source: MemoryPool = field(init=False)
    pool: MemoryPool = field(init=False)
    hooks: Hooks = field(init=False)
    ledger: Ledger = field(default_factory=Ledger)
    counters: TransferCounters = field(default_factory=TransferCounters)
    receiver: Receiver = field(init=False)

    def __post_init__(self) -> None:
        self.source = MemoryPool(LAYOUT, self.blocks, random.Random(self.seed).randbytes(LAYOUT.block_bytes))
        self.pool = MemoryPool(LAYOUT, self.blocks, b"\xff\x01", self.reused)
        there = self.reused * LAYOUT.block_bytes
        self.pool.bytes[:there] = self.source.bytes[:there]
        self.hooks = Hooks(LAYOUT, request_of(self.blocks))
        limits = ReceiveLimits(
            window_bytes=1 << 20, streams=self.most_streams, progress_timeout_s=self.timeout_s, remember_s=60.0
        )
        self.receiver = Receiver(port=self.pool, hooks=self.hooks, ledger=self.ledger, counters=self.counters, limits=limits)

    async def open(self, streams: int) -> kv.OpenReply:
        """As the right sender opens it."""
        request = request_of(self.blocks)
        claim = kv.OpenRequest(
            request_id="r", epoch=1, source_instance="p", source_incarnation=1, target_instance="d", target_incarnation=1,
            fingerprint=FINGERPRINT, num_tokens=len(request.prompt), num_blocks=self.blocks,
            block_hashes=sequence_hashes(FINGERPRINT, request), layers_per_group=LAYOUT.layers_per_group, streams=streams,
        )  # fmt: skip
        return await self.receiver.open(claim)

    def frames_of(self, block: int, frame_bytes: int) -> list[DataFrame]:
        """What is sent of a block."""
        found: list[DataFrame] = []
        for group in range(LAYOUT.num_groups):
            data = self.source.export_kv(block, group)
            found += split(block, group, data, SCOPE.of(block, group, data), frame_bytes)
        return found

    def messages(self, reply: kv.OpenReply, rng: random.Random) -> list[list[PushMessage]]:
        """Everything that is missing, by stream; several frames in a message."""
        next_blocks = list(reply.next_blocks) or [reply.first_block]
        streams = len(next_blocks)
        found: list[list[PushMessage]] = []
        for number, start in enumerate(next_blocks):
            frames = [
                frame for block in range(start, self.blocks, streams) for frame in self.frames_of(block, rng.randint(60, 400))
            ]
            queue = []
            while frames:
                count = rng.randint(1, 4)
                queue.append(push_message(reply.transfer_id, 1, frames[:count], number))
                frames = frames[count:]
            found.append(queue)
        return found

    def end(self, reply: kv.OpenReply, stream: int) -> PushMessage:
        """The right end."""
        end = kv.EndFrame(num_tokens=self.blocks * BLOCK_TOKENS, next_token_ids=pack_tokens([5]), first_output_index=0)
        end.digest = SCOPE.of_end(end)
        return PushMessage(reply.transfer_id, 1, end=end, stream=stream)

    async def push(self, queues: list[list[PushMessage]], rng: random.Random, *, hold_open: bool = True) -> list[str]:
        """All queues at once, in an order that `rng` draws; the outcome of each: COMMIT, a reason, or empty."""
        over = asyncio.Event()
        outcomes = await asyncio.gather(
            *(self._stream(queue, random.Random(rng.random()), over, hold_open) for queue in queues if queue)
        )
        return list(outcomes)

    async def _stream(self, queue: list[PushMessage], rng: random.Random, over: asyncio.Event, hold_open: bool) -> str:
        async def messages() -> AsyncIterator[PushMessage]:
            for message in queue:
                for _ in range(rng.randint(0, 6)):
                    await asyncio.sleep(0)
                yield message
            if hold_open:
                await over.wait()

        outcome = ""
        async for reply in self.receiver.push(messages()):
            if reply.HasField("commit"):
                outcome = "COMMIT"
            elif reply.HasField("refused"):
                outcome = reply.refused.reason
        return outcome

    def check_committed(self) -> None:
        """The content is there, and nothing is on its way."""
        assert self.pool.bytes == self.source.bytes
        assert len(self.hooks.arrivals) == 1 and not self.hooks.errors and len(self.ledger) == 0

    async def check_nothing_kept(self) -> None:
        """The import was given back, once."""
        await self.receiver.settle()
        assert not self.hooks.arrivals and len(self.hooks.errors) == 1
        assert self.pool.imports_dropped == 1 and len(self.ledger) == 0


@pytest.mark.parametrize("seed", range(40))
def test_any_order_of_any_number_of_streams_gives_the_content(seed: int) -> None:
    async def scenario() -> None:
        rng = random.Random(seed)
        blocks = rng.randint(1, 23)
        side = Side(blocks, rng.randint(0, blocks), seed=seed)
        reply = await side.open(rng.randint(0, 9))
        queues = side.messages(reply, rng)
        assert len(queues) <= max(1, min(8, blocks - side.reused))
        ending = rng.randrange(len(queues))
        queues[ending].append(side.end(reply, ending))
        outcomes = await side.push(queues, rng)
        assert outcomes == ["COMMIT"] * sum(map(bool, queues))
        side.check_committed()
        assert side.counters.kv_blocks_received == blocks - side.reused

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(25))
def test_after_streams_broke_only_what_is_missing_comes_again(seed: int) -> None:
    async def scenario() -> None:
        rng = random.Random(seed)
        side = Side(rng.randint(8, 23), rng.randint(0, 3), seed=seed)
        streams = rng.randint(2, 5)
        reply = await side.open(streams)
        queues = side.messages(reply, rng)
        kept = [queue[: rng.randint(0, len(queue))] for queue in queues]
        outcomes = await side.push(kept, rng, hold_open=False)
        assert set(outcomes) <= {"PEER_UNAVAILABLE"} and not side.hooks.errors
        whole = [sum(head.digest != b"" for one in queue for head in one.heads) // LAYOUT.num_groups for queue in kept]
        expected = [first_at(n, streams, side.reused) + streams * done for n, done in enumerate(whole)]
        again = await side.open(streams)
        assert again.transfer_id == reply.transfer_id and list(again.next_blocks) == expected
        assert again.first_block == min(expected)
        queues = side.messages(again, rng)
        queues[0].append(side.end(again, 0))
        assert set(await side.push(queues, rng)) == {"COMMIT"}
        side.check_committed()
        assert side.counters.kv_blocks_received == side.blocks - side.reused

    asyncio.run(scenario())


@pytest.mark.parametrize("fewer", [0, 1, 2, 5])
def test_opened_again_with_another_number_of_streams_it_goes_on_behind_the_leading_blocks(fewer: int) -> None:
    async def scenario() -> None:
        rng, side = random.Random(fewer), Side(12)
        reply = await side.open(3)
        queues = side.messages(reply, rng)
        await side.push([queues[0], queues[1][:2]], rng, hold_open=False)
        leading = (await side.open(3)).first_block
        again = await side.open(fewer)
        assert again.first_block == leading and len(again.next_blocks) == (fewer if fewer > 1 else 0)
        queues = side.messages(again, rng)
        queues[0].append(side.end(again, 0))
        assert set(await side.push(queues, rng)) == {"COMMIT"}
        side.check_committed()

    asyncio.run(scenario())


Change = Callable[[Side, list[list[PushMessage]], random.Random], None]


def flip(side: Side, queues: list[list[PushMessage]], rng: random.Random) -> None:
    queue = rng.choice(queues)
    at = rng.randrange(len(queue))
    first, *rest = frames_of(queue[at])
    payload = bytearray(first.payload)
    payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    frames = [first._replace(payload=memoryview(payload)), *rest]
    queue[at] = push_message(queue[at].transfer_id, 1, frames, queue[at].stream)


def other_number(side: Side, queues: list[list[PushMessage]], rng: random.Random) -> None:
    number = rng.randrange(len(queues))
    queue = queues[number]
    at = rng.randrange(1, len(queue))
    queue[at] = replace(queue[at], stream=(number + rng.randint(1, 2)) % 3)


def block_of_another_stream(side: Side, queues: list[list[PushMessage]], rng: random.Random) -> None:
    one, other = rng.sample(range(len(queues)), 2)
    message = rng.choice(queues[other])
    queues[one].insert(rng.randrange(len(queues[one])), replace(message, stream=one))


def twice(side: Side, queues: list[list[PushMessage]], rng: random.Random) -> None:
    queue = rng.choice(queues)
    at = rng.randrange(len(queue))
    queue.insert(at, queue[at])


def gap(side: Side, queues: list[list[PushMessage]], rng: random.Random) -> None:
    queue = rng.choice(queues)
    del queue[rng.randrange(len(queue) - 1)]


def foreign_epoch(side: Side, queues: list[list[PushMessage]], rng: random.Random) -> None:
    queue = rng.choice(queues)
    at = rng.randrange(1, len(queue))
    queue[at] = replace(queue[at], epoch=2)


CHANGES: list[tuple[Change, str]] = [
    (flip, "DIGEST_MISMATCH"),
    (other_number, "BAD_FRAME"),
    (block_of_another_stream, "BAD_FRAME"),
    (twice, "BAD_FRAME"),
    (gap, "BAD_FRAME"),
    (foreign_epoch, "BAD_FRAME"),
]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_one_stream_that_is_wrong_ends_all_of_them_and_keeps_nothing(change: Change, reason: str, seed: int) -> None:
    async def scenario() -> None:
        rng, side = random.Random(seed), Side(13, seed=seed)
        reply = await side.open(3)
        queues = side.messages(reply, rng)
        change(side, queues, rng)
        queues[0].append(side.end(reply, 0))
        outcomes = await side.push(queues, rng)
        assert reason in outcomes and set(outcomes) <= {reason, "STALE_EPOCH"}
        await side.check_nothing_kept()

    asyncio.run(scenario())


def test_the_end_waits_for_the_other_streams_but_not_forever() -> None:
    async def scenario() -> None:
        rng, side = random.Random(1), Side(9, timeout_s=0.2)
        reply = await side.open(3)
        queues = side.messages(reply, rng)
        queues[0].append(side.end(reply, 0))
        del queues[2][-1]
        assert set(await side.push(queues, rng)) == {"HANDOFF_TIMEOUT"}
        await side.check_nothing_kept()

    asyncio.run(scenario())


def test_an_end_before_its_own_stream_is_whole_is_refused_at_once() -> None:
    async def scenario() -> None:
        rng, side = random.Random(1), Side(9, timeout_s=60.0)
        reply = await side.open(3)
        queues = side.messages(reply, rng)
        queues[1][-1] = side.end(reply, 1)
        outcomes = await side.push(queues, rng)
        assert set(outcomes) == {"BAD_FRAME"}
        await side.check_nothing_kept()

    asyncio.run(scenario())


def test_a_second_end_is_refused() -> None:
    async def scenario() -> None:
        rng, side = random.Random(1), Side(9, timeout_s=60.0)
        reply = await side.open(3)
        queues = side.messages(reply, rng)
        for number in (0, 1):
            queues[number].append(side.end(reply, number))
        queues[2] = queues[2][:1]
        assert set(await side.push(queues, rng)) == {"BAD_FRAME"}
        await side.check_nothing_kept()

    asyncio.run(scenario())


def test_a_place_that_is_taken_and_a_stream_that_was_not_granted_are_refused_and_the_transfer_goes_on() -> None:
    async def scenario() -> None:
        rng, side = random.Random(1), Side(9)
        reply = await side.open(3)
        queues = side.messages(reply, rng)
        first = asyncio.create_task(side.push([[*queues[0], side.end(reply, 0)]], rng))
        await until(lambda: side.counters.kv_blocks_received > 0, "a block is there")
        assert await side.push([queues[0][:1]], rng) == ["STALE_EPOCH"]
        assert await side.push([[replace(queues[1][0], stream=3)]], rng) == ["BAD_FRAME"]
        assert await side.push([[replace(queues[1][0], stream=2**32 - 1)]], rng) == ["BAD_FRAME"]
        assert await side.push(queues[1:], rng) == ["COMMIT", "COMMIT"]
        assert await first == ["COMMIT"]
        side.check_committed()

    asyncio.run(scenario())


def test_credit_is_that_of_the_stream_and_the_streams_share_the_window() -> None:
    async def scenario() -> None:
        rng, side = random.Random(1), Side(9)
        reply = await side.open(4)
        assert len(reply.next_blocks) == 4 and reply.credit_bytes * 4 == 1 << 20
        transfer = side.receiver._table.of_id(reply.transfer_id)
        assert transfer is not None
        transfer.stripes[1].credit = 10
        outcomes = await side.push(side.messages(reply, rng), rng)
        assert "BAD_FRAME" in outcomes and set(outcomes) <= {"BAD_FRAME", "STALE_EPOCH"}
        await side.check_nothing_kept()

    asyncio.run(scenario())


def test_a_transfer_that_is_given_back_ends_every_stream() -> None:
    async def scenario() -> None:
        rng, side = random.Random(1), Side(9)
        queues = side.messages(await side.open(3), rng)
        pushing = asyncio.create_task(side.push([queue[:2] for queue in queues], rng))
        await until(lambda: side.counters.kv_bytes_received > 0, "something is there")
        side.receiver.abort_request("r", 1, StaleEpoch("r: over"))
        assert await pushing == ["STALE_EPOCH"] * 3
        await side.check_nothing_kept()

    asyncio.run(scenario())


def test_a_stripe_that_was_woken_twice_and_left_alone_can_be_woken_again() -> None:
    async def scenario() -> None:
        rng, side = random.Random(1), Side(9)
        queues = side.messages(await side.open(3), rng)
        pushing = asyncio.create_task(side.push([queue[:2] for queue in queues], rng))
        await until(lambda: side.counters.kv_bytes_received > 0, "something is there")
        await side.open(3)
        await side.open(2)
        for _ in range(rng.randint(1, 3)):
            await asyncio.sleep(0)
        side.receiver.abort_request("r", 1, StaleEpoch("r: over"))
        assert set(await pushing) == {"STALE_EPOCH"}
        await side.check_nothing_kept()

    asyncio.run(scenario())
