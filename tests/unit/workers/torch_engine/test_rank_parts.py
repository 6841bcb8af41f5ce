"""The parts that ranks are made of: plans of steps, shares of KV rows, sums, links."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch

from protos.contract.errors import EngineFailure, ModelError
from tests.support.torch_models import a_slice
from workers.batching.runner import Slice
from workers.engine_api.types import KvLayout
from workers.engines.torch.distributed_ranks import DistributedRanks, listening_socket
from workers.engines.torch.kv_shares import RowShare
from workers.engines.torch.rank_links import Channel, Frame, Link, LinkDoor, open_links
from workers.engines.torch.ranks import RankOf, kv_head_share
from workers.engines.torch.step_plan import PlanReader, PlanWriter

# -- plans --------------------------------------------------------------------------------------------------------------


def random_batches(seed: int, steps: int) -> Iterator[list[Slice]]:
    """Sequences that come, grow, get other blocks, pause and go."""
    rng = random.Random(seed)
    live: dict[str, tuple[list[int], tuple[int, ...]]] = {}
    for step in range(steps):
        if rng.random() < 0.4 or not live:
            live[f"s{step}"] = ([rng.randrange(1000) for _ in range(rng.randrange(2, 60))], tuple(rng.sample(range(500), 3)))
        for name, (tokens, table) in list(live.items()):
            match rng.randrange(5):
                case 0:
                    live[name] = ([*tokens, rng.randrange(1000)], (*table, rng.randrange(500)))
                case 1:
                    live[name] = (tokens, tuple(rng.sample(range(500), rng.randrange(1, 6))))
                case 2 if len(live) > 1:
                    del live[name]
        names = rng.sample(sorted(live), rng.randrange(1, len(live) + 1))
        batch = []
        for name in names:
            tokens, table = live[name]
            start = rng.randrange(len(tokens))
            count = rng.randrange(1, len(tokens) - start + 1)
            batch.append(a_slice(tokens, start, count, table, request_id=name, sample=start + count == len(tokens)))
        yield batch


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_says_what_the_batch_says(seed: int) -> None:
    writer, reader = PlanWriter(), PlanReader()
    for batch in random_batches(seed, 30):
        found = reader.decode(memoryview(writer.encode(batch)))
        assert len(found) == len(batch)
        for piece, other in zip(batch, found, strict=True):
            end = piece.start + piece.count
            assert (other.start, other.count, other.sample) == (piece.start, piece.count, piece.sample)
            assert other.block_table == piece.block_table
            assert list(other.tokens[other.start : end]) == list(piece.tokens[piece.start : end])
            assert len(other.tokens) == end


def test_a_decode_step_of_a_long_sequence_is_small_on_the_wire() -> None:
    writer, table = PlanWriter(), tuple(range(4096))
    tokens = [1] * 5000
    first = writer.encode([a_slice(tokens, 4000, 1, table)])
    second = writer.encode([a_slice(tokens, 4001, 1, table)])
    assert len(first) > 4 * len(table)
    assert len(second) == 4 * (1 + 6 + 1)


def test_a_rank_asks_for_no_token_that_it_does_not_know() -> None:
    writer, reader = PlanWriter(), PlanReader()
    (piece,) = reader.decode(memoryview(writer.encode([a_slice(list(range(10)), 4, 3, (1,))])))
    assert piece.tokens[4] == 4 and piece.tokens[-1] == 6
    for unknown in (3, slice(0, 5)):
        with pytest.raises(IndexError):
            piece.tokens[unknown]


# -- shares of rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_shares_put_bytes_where_the_full_row_has_them(seed: int) -> None:
    rng = random.Random(seed)
    parts, piece, rows = rng.choice((1, 2, 4)), rng.choice((1, 3, 8)), rng.randrange(1, 6)
    full = np.frombuffer(rng.randbytes(rows * 2 * parts * piece), dtype=np.uint8)
    shares = [RowShare(parts, part, piece) for part in range(parts)]
    held = [np.zeros(full.size // parts, dtype=np.uint8) for _ in shares]
    cuts = sorted({0, full.size, *(rng.randrange(full.size) for _ in range(rng.randrange(6)))})
    for begin, end in pairwise(cuts):
        for share, mine in zip(shares, held, strict=True):
            offset, data = share.split(begin, full[begin:end].data)
            mine[offset : offset + data.nbytes] = np.frombuffer(data, dtype=np.uint8)
    for part, mine in enumerate(held):  # byte by byte, the slow way
        assert mine.tolist() == [byte for at, byte in enumerate(full.tolist()) if at // piece % parts == part]
    merged = np.zeros_like(full)
    for share, mine in zip(shares, held, strict=True):
        share.merge(merged, mine.data)
    assert merged.tolist() == full.tolist()


@pytest.mark.parametrize("target_bytes", [1, 5000, 1 << 30])
def test_a_share_has_the_layer_groups_of_the_full_rows(target_bytes: int) -> None:
    full = KvLayout(block_tokens=16, num_layers=7, row_bytes=64, dtype="float32", name="n", target_group_bytes=target_bytes)
    share = RowShare(4, 1, 8).layout(full)
    assert share.num_groups == full.num_groups
    assert [4 * share.group_bytes(g) for g in range(share.num_groups)] == [full.group_bytes(g) for g in range(full.num_groups)]


def test_kv_heads_follow_their_query_heads() -> None:
    for heads, kv_heads, size in ((8, 4, 2), (8, 2, 4), (8, 8, 8), (4, 1, 4)):
        for rank in range(size):
            mine = range(rank * heads // size, (rank + 1) * heads // size)
            held = kv_head_share(kv_heads, RankOf(rank, size))
            assert sorted({head // (heads // kv_heads) for head in mine}) == list(range(held.start, held.stop))
    with pytest.raises(ModelError, match="num_key_value_heads: 3 cannot be shared by 2 ranks"):
        kv_head_share(3, RankOf(0, 2))


# -- sums ---------------------------------------------------------------------------------------------------------------


@contextmanager
def connected(size: int, timeout_s: float = 10.0) -> Iterator[tuple[list[DistributedRanks], Callable[..., list[torch.Tensor]]]]:
    """Ranks on threads, and a function that calls one thing on each of them at once."""
    ranks = [DistributedRanks(rank, size, "127.0.0.1", torch.device("cpu"), timeout_s) for rank in range(size)]
    listener = listening_socket("127.0.0.1")
    port = listener.getsockname()[1]
    with ThreadPoolExecutor(size) as pool:

        def every(call: Callable[[DistributedRanks], torch.Tensor]) -> list[torch.Tensor]:
            return list(pool.map(call, ranks))

        every(lambda one: one.connect("127.0.0.1", port, listener if one.rank == 0 else None))  # type: ignore[func-returns-value]
        yield ranks, every
        for one in ranks:
            one.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_has_the_same_bits_on_every_rank_and_in_every_batch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [(torch.randn(33, 48, generator=generator) * 10.0**rank).to(dtype) for rank in range(4)]
    exact = parts[0].float()
    for part in parts[1:]:
        exact = exact + part.float()
    with connected(4) as (_, every):
        whole = every(lambda one: one.sum(parts[one.rank].clone()))
        assert all(torch.equal(one, exact.to(dtype)) for one in whole)
        for rows in ([5], [32, 0, 7], list(range(10, 33))):
            some = every(lambda one, rows=rows: one.sum(parts[one.rank][rows].clone()))
            assert all(torch.equal(one, whole[0][rows]) for one in some)
        joined = every(lambda one: one.join_columns(parts[one.rank]))
        assert all(torch.equal(one, torch.cat(parts, dim=1)) for one in joined)
        nothing = every(lambda one: one.join_columns(parts[one.rank][:0]))
        assert [tuple(one.shape) for one in nothing] == [(0, 4 * 48)] * 4


def test_a_collective_that_waits_too_long_names_its_rank() -> None:
    with connected(2, timeout_s=0.5) as (ranks, _), pytest.raises(EngineFailure, match="rank 0 of 2 lost another one"):
        ranks[0].sum(torch.ones(1, 1))


# -- links --------------------------------------------------------------------------------------------------------------


def test_only_ranks_with_the_token_are_let_in() -> None:
    door = LinkDoor("127.0.0.1", 2, 5.0, 5.0)
    host, port = door.address.split(":")
    opened: list[Link] = []

    def knock() -> None:
        for hello in (b"", b"x" * 24, bytes(16) + (1).to_bytes(4, "little") + bytes(4)):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(hello)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b"", "turned away"
        for link in open_links(door.address, door.token, 1, 5.0):
            opened.append(link)

    visitor = threading.Thread(target=knock)
    visitor.start()
    links = door.accept_all()
    visitor.join()
    big = bytes(range(256)) * 4096
    links[Channel.BLOCKS][0].send(Frame.WRITE, b"head", big)
    kind, payload = opened[Channel.BLOCKS].receive()
    assert kind is Frame.WRITE and bytes(payload) == b"head" + big
    opened[Channel.BLOCKS].send(Frame.BYTES)
    with pytest.raises(EngineFailure, match="rank 1 answered BYTES instead of WRITTEN"):
        links[Channel.BLOCKS][0].expect(Frame.WRITTEN)
    with pytest.raises(EngineFailure, match="rank 0 is lost"):
        opened[Channel.BLOCKS].receive()
    opened[Channel.STEPS].close()
    with pytest.raises(EngineFailure, match="rank 1 is lost"):
        links[Channel.STEPS][0].receive()
    links[Channel.STEPS][0].close()


def test_a_door_does_not_wait_for_ever() -> None:
    with pytest.raises(EngineFailure, match=r"not all of 3 ranks connected within 0\.1 s"):
        LinkDoor("127.0.0.1", 3, 0.1, 0.1).accept_all()
