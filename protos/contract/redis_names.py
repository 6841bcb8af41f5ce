"""The contract with Redis that the orchestrator and the workers share: library, functions, keys, channels, codes.

The functions themselves are in orchestrator/store/lua; each file's header gives ARGV, reply and promise.
Every key of one cluster carries one hash tag, so a cluster is one slot of a Redis Cluster.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections.abc import Iterable
from enum import StrEnum

LIBRARY = "autan_v1"
PROTOCOL_VERSION = 2


class Fn(StrEnum):
    """The functions of the library, by who may call them (DESIGN section 3)."""

    # ingress
    INGRESS = "autan_ingress"
    SUBMIT = "autan_submit"
    CANCEL = "autan_cancel"
    RESUME = "autan_resume"
    EMIT = "autan_emit"
    FINISH = "autan_finish"
    LOOK = "autan_look"
    ORPHANS = "autan_orphans"
    # core
    LEAD = "autan_lead"
    VIEW = "autan_view"
    ASSIGN = "autan_assign"
    REAP = "autan_reap"
    MIGRATE = "autan_migrate"
    PROMPTS = "autan_prompts"
    # worker
    REGISTER = "autan_register"
    DEREGISTER = "autan_deregister"
    PICK = "autan_pick"
    RENEW = "autan_renew"
    HANDOFF = "autan_handoff"
    FAIL = "autan_fail"
    STAY = "autan_stay"
    # core, operators
    DRAIN = "autan_drain"
    STATS = "autan_stats"
    REQUESTS = "autan_requests"
    MOVES = "autan_moves"


class Code(StrEnum):
    """First element of every reply. Distinct codes for `not yours` and `not there`."""

    OK = "OK"
    DUPLICATE = "DUPLICATE"  # done already, by the same caller: nothing changed
    CONFLICT = "CONFLICT"  # the id is taken by another body
    FULL = "FULL"  # the queue is full
    GONE = "GONE"  # no such request or instance
    STALE = "STALE"  # another epoch, incarnation or owner
    STATE = "STATE"  # the state does not allow it
    GAP = "GAP"  # token index beyond the next one
    DIVERGED = "DIVERGED"  # a re-sent token differs from the journaled one
    NOT_LEADER = "NOT_LEADER"


class InboxKind(StrEnum):
    """What an instance finds in its inbox."""

    PREFILL = "prefill"  # compute the prompt (and hand it to the peer, if the peer is another instance)
    EXPECT = "expect"  # the peer will hand this request over
    LEND = "lend"  # push cached blocks of the request's tokens to the peer, which prefills it
    REVOKE = "revoke"  # drop the request up to and including this epoch
    OWNER = "owner"  # another ingress owns the request: replay what it has not acknowledged
    MOVE = "move"  # copy the KV of a decoding request to the peer, which then takes over
    ARRIVE = "arrive"  # the peer moves a decoding request here
    STAY = "stay"  # a move is over without a commit


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")


def is_name(value: str) -> bool:
    """True for an id that cannot leave the hash slot or collide with another key."""
    return _NAME.match(value) is not None


def base_key(cluster: str) -> str:
    """KEYS[1] of every function: the hash tag of the cluster. All other keys are made from it by the library.

    Raises ValueError for a name outside `[A-Za-z0-9_.-]{1,64}`.
    """
    if not is_name(cluster):
        raise ValueError(f"cluster name {cluster!r} is not of [A-Za-z0-9_.-], 1 to 64 characters")
    return "{autan:" + cluster + "}"


def core_channel(cluster: str) -> str:
    """Pub/sub hint: something changed that the core decides on. Lossy; always re-poll."""
    return base_key(cluster) + ":hint:core"


def instance_channel(cluster: str, instance_id: str) -> str:
    """Pub/sub hint: the instance's inbox has news. Lossy; always re-poll."""
    return base_key(cluster) + ":hint:i:" + instance_id


def ingress_channel(cluster: str, ingress_id: str) -> str:
    """Pub/sub hint: a request of this ingress ended elsewhere; the payload is its id. Lossy; always re-poll."""
    return base_key(cluster) + ":hint:g:" + ingress_id


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32, as the journal and the wire keep them. Raises OverflowError for what is no uint32."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """The reverse of pack_tokens. Raises ValueError when the length is not a multiple of four."""
    if len(packed) % 4:
        raise ValueError(f"{len(packed)} bytes are no whole number of uint32 token ids")
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))
