"""Digests of layer groups and of the end: they bind bytes to a place, so a swapped, stale or foreign block does not verify."""

from __future__ import annotations

import hmac
import struct

import xxhash

from protos.contract.errors import BadFrame, DigestMismatch
from protos.wire import kv

DIGEST_BYTES = 16
_END = b"end"
_PLACE = struct.Struct("<II")


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
        return xxhash.xxh3_128(self._prefix + _PLACE.pack(block_index, group))

    def of(self, block_index: int, group: int, data: memoryview | bytes) -> bytes:
        """The digest of a whole layer group."""
        digest = self.start(block_index, group)
        digest.update(data)
        return digest.digest()

    def of_end(self, end: kv.EndFrame) -> bytes:
        """The digest of an end frame: everything in it but its digest. No block has the same."""
        numbers = struct.pack("<QQd", end.num_tokens, end.first_output_index, end.since_prefill_s)
        parts = (end.next_token_ids, end.timeline.SerializeToString(deterministic=True), *end.next_logprobs)
        digest = xxhash.xxh3_128(self._prefix + _END + numbers)
        for part in parts:
            digest.update(struct.pack("<I", len(part)) + part)
        return bytes(digest.digest())

    def check_end(self, end: kv.EndFrame) -> None:
        """Raises BadFrame for an end without a digest, DigestMismatch for one that is not as its sender made it."""
        if len(end.digest) != DIGEST_BYTES:
            raise BadFrame(f"end: a digest of {len(end.digest)} bytes, it has {DIGEST_BYTES}")
        if not hmac.compare_digest(self.of_end(end), end.digest):
            raise DigestMismatch("end: it is not the one that was sent")
