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

    def whole(self, index: int, block_id: int, group: int, batch: Batch) -> DataFrame | None:
        """One layer group of the pinned block that is number `index` of the sequence, as the one frame that it is; None when it
        has to be packed or cut.

        A group travels by reference when the bytes that the engine shows lie in the shared pool: a copy that it made, say
        of a device's memory, travels with its bytes, packed where that was agreed on.
        """
        in_one = self._packer.passes_through and self._port.layout.group_bytes(group) <= batch.limit_bytes
        if self._segment is None and not in_one:
            return None  # unread: from a device, the engine would copy it twice
        data = self._port.export_kv(block_id, group)
        if self._segment is not None and data.nbytes <= batch.most_bytes:
            offset = self._segment.offset_of(data)
            if offset is not None:
                digest = self._scope.of(index, group, data)
                return DataFrame(index, group, 0, _EMPTY, digest, pool_offset=offset, pool_bytes=data.nbytes)
        if not in_one:
            return None
        return DataFrame(index, group, 0, data, self._scope.of(index, group, data))

    async def frames(self, index: int, block_id: int, group: int, batch: Batch) -> Iterable[DataFrame]:
        """The frames of a group that is packed or cut; each fits `batch`."""
        payload, digest = await self._packer.pack(index, group, self._port.export_kv(block_id, group))
        return split(index, group, payload, digest, batch.limit_bytes, self._packer.encoding.value)
