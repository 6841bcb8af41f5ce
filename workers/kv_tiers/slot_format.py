"""The header in front of each block in a file: it binds the payload to its name, its place and the model.

Little endian: magic, version, depth, length of the payload, fingerprint, name, parent, digest of the payload, digest of all
that before. Both digests are xxh3-128; that of the payload covers fingerprint, name, parent and depth as well.
"""

from __future__ import annotations

import hashlib
import struct

import xxhash

from workers.engine_api.block_files import StoredBlock
from workers.engine_api.types import KvLayout, ModelIdentity

MAGIC = b"AUTANKV\x00"
VERSION = 1
NAME_BYTES = 16
_FIELDS = struct.Struct("<8sIIQ16s16s16s16s")
HEADER_BYTES = _FIELDS.size + 16
MAX_DEPTH = 2**24


def fingerprint_key(identity: ModelIdentity, layout: KvLayout) -> bytes:
    """16 bytes that differ when blocks of one engine mean nothing to the other."""
    fields = (
        identity.architecture, identity.weights_digest, layout.name, layout.dtype,
        str(layout.block_tokens), str(layout.num_layers), str(layout.row_bytes),
    )  # fmt: skip
    digest = hashlib.blake2b(digest_size=16, person=b"autan-kv-files")
    for field in fields:
        encoded = field.encode()
        digest.update(struct.pack("<I", len(encoded)) + encoded)
    return digest.digest()


def payload_digest(fingerprint: bytes, block: StoredBlock, payload: memoryview | bytes) -> bytes:
    """What must be equal for the payload to be that block of that model."""
    digest = xxhash.xxh3_128(fingerprint + block.name + block.parent + struct.pack("<I", block.depth))
    digest.update(payload)
    return bytes(digest.digest())


def pack_header(fingerprint: bytes, block: StoredBlock, payload: memoryview) -> bytes:
    """The header of this payload."""
    digest = payload_digest(fingerprint, block, payload)
    fields = _FIELDS.pack(
        MAGIC, VERSION, block.depth, payload.nbytes, fingerprint, block.name, block.parent, digest
    )  # fmt: skip
    return fields + xxhash.xxh3_128_digest(fields)


def parse_header(raw: bytes | memoryview, fingerprint: bytes, payload_bytes: int) -> tuple[StoredBlock, bytes] | None:
    """The block and the digest of its payload; None for anything but a whole header of this model and size."""
    raw = bytes(raw)
    if len(raw) != HEADER_BYTES or xxhash.xxh3_128_digest(raw[: _FIELDS.size]) != raw[_FIELDS.size :]:
        return None
    magic, version, depth, length, owner, name, parent, digest = _FIELDS.unpack(raw[: _FIELDS.size])
    if (magic, version, owner, length) != (MAGIC, VERSION, fingerprint, payload_bytes) or depth > MAX_DEPTH:
        return None
    return StoredBlock(name, parent, depth), digest
