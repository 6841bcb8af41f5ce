"""The names of the full blocks of a sequence, as both sides of a hand-off compute them."""

from __future__ import annotations

from protos.contract.block_hash import packed_block_hashes, root_hash
from protos.contract.redis_names import pack_tokens
from protos.wire import common
from workers.engine_api.types import EngineRequest


def sequence_hashes(fingerprint: common.Fingerprint, request: EngineRequest) -> bytes:
    """16 bytes for each full block of prompt and output, concatenated. Equal bytes mean equal tokens and model.

    The root is that of the engines' prefix caches, so a block has one name everywhere.
    """
    root = root_hash(fingerprint.weights_digest, request.cache_salt)
    packed = pack_tokens(request.prompt + request.output)
    return packed_block_hashes(root, packed, fingerprint.block_tokens)
