"""Content hashes of KV blocks, the same on the ingress, the core and the workers.

A full block is named by a hash chained over everything before it: two equal names mean equal tokens at equal
positions, of one tenant, for one model. Partial blocks have no name and are never shared.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from itertools import islice

HASH_BYTES = 16


def root_hash(model_fingerprint: str, cache_salt: bytes) -> bytes:
    """The parent of every first block: binds the chain to one model and one tenant."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES, person=b"autan-kv-root")
    digest.update(model_fingerprint.encode())
    digest.update(b"\0")
    digest.update(cache_salt)
    return digest.digest()


def next_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of the block with these tokens behind `parent`."""
    packed = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return hashlib.blake2b(packed, digest_size=HASH_BYTES, key=parent).digest()


def block_hashes(root: bytes, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """The names of all full blocks of a sequence, in order."""
    names: list[bytes] = []
    parent = root
    stream = iter(token_ids)
    for _ in range(len(token_ids) // block_tokens):
        parent = next_hash(parent, list(islice(stream, block_tokens)))
        names.append(parent)
    return names


def packed_block_hashes(root: bytes, packed_tokens: bytes, block_tokens: int) -> bytes:
    """As `block_hashes`, of tokens packed as little-endian uint32, the names concatenated: nothing is unpacked."""
    size = 4 * block_tokens
    names: list[bytes] = []
    parent = root
    for at in range(0, len(packed_tokens) - size + 1, size):
        parent = hashlib.blake2b(packed_tokens[at : at + size], digest_size=HASH_BYTES, key=parent).digest()
        names.append(parent)
    return b"".join(names)


def unpack_names(packed: bytes) -> list[bytes]:
    """Concatenated names one by one. Raises ValueError when the length is not a multiple of theirs."""
    if len(packed) % HASH_BYTES:
        raise ValueError(f"{len(packed)} bytes are no whole number of block names")
    return [packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES)]
