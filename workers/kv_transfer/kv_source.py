"""The frames of layer groups as their sender makes them: with their bytes, or with a reference to the shared pool."""

from __future__ import annotations

from collections.abc import Iterable

from workers.engine_api.pool_memory import PoolSegment
from workers.kv_transfer.digest import DigestScope
from workers.kv_transfer.encodings import Encoding
from workers.kv_transfer.frames import Batch, split
from workers.kv_transfer.packing import GroupPacker
from workers.kv_transfer.port import EnginePort
from workers.kv_transfer.push_codec import DataFrame

_EMPTY = memoryview(b"")


class KvSource:
    """What one attempt of a hand-off sends. `segment` is the pool that the receiver has mapped, None when it has not."""

    def __init__(self, port: EnginePort, scope: DigestScope, encoding: Encoding, segment: PoolSegment | None) -> None:
        self._port = port
        self._packer = GroupPacker(encoding, port.layout, scope)
        self._scope = scope
        self._segment = segment

    async def frames(self, index: int, block_id: int, group: int, batch: Batch) -> Iterable[DataFrame]:
        """The frames of one layer group of the pinned block that is number `index` of the sequence; each fits `batch`.

        A group travels by reference when the bytes that the engine shows lie in the shared pool: a copy that it made, say
        of a device's memory, travels with its bytes, packed where that was agreed on.
        """
        data = self._port.export_kv(block_id, group)
        offset = None if self._segment is None else self._segment.offset_of(data)
        if offset is None or data.nbytes > batch.most_bytes:
            payload, digest = await self._packer.pack(index, group, data)
            return split(index, group, payload, digest, batch.limit_bytes, self._packer.encoding.value)
        digest = self._scope.of(index, group, data)
        return (DataFrame(index, group, 0, _EMPTY, digest, pool_offset=offset, pool_bytes=data.nbytes),)
