"""A rank above 0: its share of the weights and of the KV pool, computing what rank 0 plans."""

from __future__ import annotations

import threading
from contextlib import suppress

import torch

from protos.contract.errors import AutanError, EngineFailure
from workers.engines.torch.distributed_ranks import DistributedRanks
from workers.engines.torch.group_runner import PLACE_IN_POOL
from workers.engines.torch.kv_cache import KvCache
from workers.engines.torch.models.decoder import Decoder
from workers.engines.torch.rank_links import Frame, Link, open_links
from workers.engines.torch.step_plan import PlanReader
from workers.engines.torch.steps import Steps


class EngineFollower:
    """Implements EngineShare."""

    def __init__(
        self,
        decoder: Decoder,
        steps: Steps,
        cache: KvCache,
        ranks: DistributedRanks,
        device: torch.device,
        connect_timeout_s: float,
    ) -> None:
        self._decoder = decoder
        self._steps = steps
        self._cache = cache
        self._ranks = ranks
        self._device = device
        self._connect_timeout_s = connect_timeout_s
        self._links: list[Link] = []

    def connect(self, address: str, token: bytes) -> None:
        """See EngineShare."""
        for link in open_links(address, token, self._ranks.rank, self._connect_timeout_s):
            self._links.append(link)
        port = int(bytes(self._links[0].expect(Frame.COLLECTIVES)))
        self._ranks.connect(address.rpartition(":")[0], port)

    def serve(self) -> None:
        """See EngineShare. Steps are computed on this thread, blocks are read and written on another one."""
        steps, blocks = self._links
        threading.Thread(target=self._serve_blocks, args=(blocks, steps), name="autan-blocks", daemon=True).start()
        plans = PlanReader()
        while True:
            kind, payload = steps.receive()
            if kind is Frame.END:
                return
            if kind is not Frame.STEP:
                raise EngineFailure(f"rank 0 sent {kind.name} on the link of steps")
            with torch.inference_mode():
                self._steps.logits(self._decoder, plans.decode(payload), self._cache, self._device)

    def close(self) -> None:
        """See EngineShare."""
        for link in self._links:
            link.close()
        self._ranks.close()

    def _serve_blocks(self, blocks: Link, steps: Link) -> None:
        with suppress(AutanError):  # rank 0 is gone; the thread of the steps tells why
            while True:
                self._serve_one(blocks)
        steps.close()

    def _serve_one(self, blocks: Link) -> None:
        kind, payload = blocks.receive()
        block_id, group, offset_bytes = PLACE_IN_POOL.unpack_from(payload)
        if kind is Frame.READ:
            blocks.send(Frame.BYTES, self._cache.read(block_id, group))
        elif kind is Frame.WRITE:
            self._cache.write(block_id, group, offset_bytes, payload[PLACE_IN_POOL.size :])
            blocks.send(Frame.WRITTEN)
        else:
            raise EngineFailure(f"rank 0 sent {kind.name} on the link of blocks")
