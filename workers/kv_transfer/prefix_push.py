"""The sending side of prefixes: cached blocks go to an instance that is about to compute the prompt they begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protos.contract.block_hash import HASH_BYTES
from protos.rpc import kv_pb2_grpc
from protos.wire import kv
from workers.kv_transfer.handoff_job import HandoffJob, SendContext
from workers.kv_transfer.push_calls import StreamChannels
from workers.kv_transfer.sender import Handoff


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixJob(HandoffJob):
    """The first `blocks` full blocks of a request's tokens, which stay the source's as well."""

    blocks: int

    @property
    def num_tokens(self) -> int:
        """Tokens of whole blocks."""
        return self.blocks * self.fingerprint.block_tokens


class PrefixPush(Handoff):
    """One prefix on its way. Nobody becomes the holder of anything by it, so a lost commit is simply pushed again, once."""

    push_method = "/autan.v1.PrefixTransfer/Push"

    def __init__(self, job: PrefixJob, channels: StreamChannels, context: SendContext, host: str = "") -> None:
        super().__init__(job, channels, context, host)
        make: Any = kv_pb2_grpc.PrefixTransferStub
        self._stub = make(channels(0))

    async def say_nothing_is_here(self, timeout_s: float) -> None:
        """Tells the target not to wait. Raises grpc.RpcError."""
        await self._stub.Open(self._open_request(), timeout=timeout_s)

    def _open_request(self) -> kv.OpenRequest:
        request = super()._open_request()
        request.block_hashes = request.block_hashes[: self.num_blocks * HASH_BYTES]
        return request

    async def _is_committed(self) -> bool:
        return False
