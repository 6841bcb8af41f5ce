"""The names of the full blocks of a sequence, as both sides of a hand-off compute them."""

from __future__ import annotations

from protos.contract.block_hash import block_hashes, root_hash
from protos.wire import common, fingerprint_key
from workers.engine_api.types import EngineRequest


def sequence_hashes(fingerprint: common.Fingerprint, request: EngineRequest) -> bytes:
    """16 bytes for each full block of prompt and output, concatenated. Equal bytes mean equal tokens and model."""
    root = root_hash(fingerprint_key(fingerprint), request.cache_salt)
    return b"".join(block_hashes(root, request.prompt + request.output, fingerprint.block_tokens))
