"""Rank 0 of a group: it alone plans, samples and moves KV; the others repeat its forward passes on their shares.

KV blocks leave and enter as full rows, whatever the number of ranks. Latent rows are the same on every rank: rank 0 reads its
own. Rows of grouped-query attention are spread by heads: a read asks the ranks that hold the other pieces, which costs
one exchange for each layer group and saves rank 0 a second copy of the whole pool. A write returns when every rank has it, so
whatever is committed afterwards is complete everywhere.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

import numpy as np

from workers.batching.runner import OnGroups, Sampled, Slice
from workers.engine_api.types import KvLayout, ModelIdentity
from workers.engines.torch.distributed_ranks import DistributedRanks, listening_socket
from workers.engines.torch.kv_shares import RowShare
from workers.engines.torch.rank_links import Channel, Frame, Link, LinkDoor
from workers.engines.torch.runner import TorchRunner
from workers.engines.torch.step_plan import PlanWriter

PLACE_IN_POOL = struct.Struct("<IIQ")  # block, layer group, offset in the share in bytes


class GroupHub:
    """Rank 0's connections. Implements GroupDoor; nothing else works before `connect`."""

    def __init__(self, door: LinkDoor, ranks: DistributedRanks, host: str) -> None:
        self._door = door
        self._ranks = ranks
        self._host = host
        self._links: dict[Channel, list[Link]] = {}
        self._plans = PlanWriter()
        self._blocks_lock = threading.Lock()

    @property
    def address(self) -> str:
        """See GroupDoor."""
        return self._door.address

    @property
    def token(self) -> bytes:
        """See GroupDoor."""
        return self._door.token

    def connect(self) -> None:
        """See GroupDoor."""
        if self._links:
            return
        self._links = self._door.accept_all()
        listener = listening_socket(self._host)
        port = listener.getsockname()[1]
        for link in self._links[Channel.STEPS]:
            link.send(Frame.COLLECTIVES, str(port).encode())
        self._ranks.connect(self._host, port, listener)

    def announce(self, batch: Sequence[Slice]) -> None:
        """Sends the plan of a step to every rank. Raises EngineFailure."""
        plan = self._plans.encode(batch)
        for link in self._links[Channel.STEPS]:
            link.send(Frame.STEP, plan)

    def write(self, place: Sequence[tuple[int, int, int, memoryview]]) -> None:
        """Writes one piece on each of the ranks from 1 on; returns when all have it. Raises EngineFailure."""
        with self._blocks_lock:
            asked = []
            for link, (block_id, group, offset_bytes, data) in zip(self._links[Channel.BLOCKS], place, strict=True):
                if data.nbytes:
                    link.send(Frame.WRITE, PLACE_IN_POOL.pack(block_id, group, offset_bytes), data)
                    asked.append(link)
            for link in asked:
                link.expect(Frame.WRITTEN)

    def read(self, block_id: int, group: int, ranks: Sequence[int]) -> list[memoryview]:
        """The share of one layer group that each of these ranks holds. Raises EngineFailure."""
        with self._blocks_lock:
            links = [self._links[Channel.BLOCKS][rank - 1] for rank in ranks]
            for link in links:
                link.send(Frame.READ, PLACE_IN_POOL.pack(block_id, group, 0))
            return [link.expect(Frame.BYTES) for link in links]

    def close(self) -> None:
        """Ends the group. Idempotent."""
        self._door.close()
        for link in self._links.get(Channel.STEPS, ()):
            link.end(Frame.END)
        for links in self._links.values():
            for link in links:
                link.close()
        self._ranks.close()


class GroupRunner:
    """Implements workers.batching.runner.Runner over rank 0's own share and the hub. `shares` are those of all ranks."""

    def __init__(self, inner: TorchRunner, full: KvLayout, shares: Sequence[RowShare], hub: GroupHub) -> None:
        self._inner = inner
        self._layout = full
        self._shares = tuple(shares)
        self._hub = hub
        # The first rank that holds a piece answers for it.
        owners = {share.part: rank for rank, share in reversed(list(enumerate(self._shares)))}
        self._owners = [owners[part] for part in range(self._shares[0].parts)]
        inner.before_forward = hub.announce

    @property
    def identity(self) -> ModelIdentity:
        """The model; constant."""
        return self._inner.identity

    @property
    def layout(self) -> KvLayout:
        """How KV bytes lie in a block, full rows; constant."""
        return self._layout

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, on every rank."""
        return self._inner.num_blocks

    def run(self, batch: Sequence[Slice], on_groups: OnGroups | None = None) -> list[Sampled]:
        """See Runner.run. Raises EngineFailure when a rank is lost."""
        # What rank 0 has stored another rank may not have yet.
        return self._inner.run(batch, on_groups if self._shares[0].parts == 1 else None)

    def expert_visits(self) -> tuple[int, ...]:
        """See Runner.expert_visits; every rank routes all rows."""
        return self._inner.expert_visits()

    def read_block(self, block_id: int, group: int) -> memoryview:
        """See Runner.read_block. Raises EngineFailure when a rank is lost."""
        own = self._inner.read_block(block_id, group)
        if self._shares[0].parts == 1:
            return own
        full = np.empty(self._layout.group_bytes(group), dtype=np.uint8)
        self._shares[0].merge(full, own)
        others = self._owners[1:]
        for rank, share in zip(others, self._hub.read(block_id, group, others), strict=True):
            self._shares[rank].merge(full, share)
        return full.data.toreadonly()

    def write_block(self, block_id: int, group: int, offset_bytes: int, data: memoryview) -> memoryview | None:
        """See Runner.write_block. Raises EngineFailure when a rank is lost."""
        pieces = [(block_id, group, *share.split(offset_bytes, data.cast("B"))) for share in self._shares]
        self._hub.write(pieces[1:])
        written = self._inner.write_block(*pieces[0])
        return written if self._shares[0].parts == 1 else None

    def writable_group(self, block_id: int, group: int) -> memoryview | None:
        """None: every rank has to get its share."""
        return None

    def close(self) -> None:
        """Ends the group and frees the pool. Idempotent."""
        self._hub.close()
        self._inner.close()
