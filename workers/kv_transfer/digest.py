"""Digests of layer groups: they bind bytes to a place, so a swapped, stale or foreign block does not verify."""

from __future__ import annotations

import struct

import xxhash

DIGEST_BYTES = 16


class DigestScope:
    """What all digests of one hand-off share: fingerprint, request and epoch."""

    def __init__(self, fingerprint_key: str, request_id: str, epoch: int) -> None:
        self._place = (fingerprint_key, request_id, epoch)
        fields = (fingerprint_key.encode(), request_id.encode())
        prefix = b"".join(struct.pack("<I", len(field)) + field for field in fields)
        self._prefix = prefix + struct.pack("<Q", epoch)

    def packed(self, encoding: str) -> DigestScope:
        """The scope of digests over packed bytes, which verify as nothing else."""
        fingerprint_key, request_id, epoch = self._place
        return DigestScope(f"{fingerprint_key} {encoding}", request_id, epoch)

    def start(self, block_index: int, group: int) -> xxhash.xxh3_128:
        """A digest to feed with the bytes of one layer group, in order."""
        return xxhash.xxh3_128(self._prefix + struct.pack("<II", block_index, group))

    def of(self, block_index: int, group: int, data: memoryview | bytes) -> bytes:
        """The digest of a whole layer group."""
        digest = self.start(block_index, group)
        digest.update(data)
        return bytes(digest.digest())
