"""Signs the capability of each hand-off that the core assigns and of each move. See protos.contract.capability."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.control.effects import Assignment, Moved
from protos.contract.capability import Grant, GrantKind, Keyring, expiry_ms
from protos.wire import kv

Sign = Callable[[Assignment], bytes]
SignMove = Callable[[Grant], bytes]


def unsigned(item: Assignment) -> bytes:
    """No capability: for workers that have no keys."""
    del item
    return b""


def unsigned_move(grant: Grant) -> bytes:
    """No capability: for workers that have no keys."""
    del grant
    return b""


def move_grant(item: Moved) -> Grant:
    """As many blocks as the request may ever fill: nobody knows how far it gets until it pauses."""
    return Grant(
        request_id=item.request_id,
        epoch=item.move_epoch,
        source_instance=item.source,
        source_incarnation=item.source_incarnation,
        target_instance=item.target,
        target_incarnation=item.target_incarnation,
        blocks=item.most_blocks,
        kv_bytes=item.most_blocks * item.block_bytes,
        expires_at_ms=expiry_ms(item.deadline_ms),
    )


def signer(keys: Callable[[], Keyring]) -> Sign:
    """Signs with the first of the keys as they are at that moment. The grant ends soon after the request's deadline."""

    def sign(item: Assignment) -> bytes:
        if item.prefill == item.decode:
            return b""  # nothing is handed over
        grant = Grant(
            request_id=item.request_id,
            epoch=item.expected_epoch + 1,
            source_instance=item.prefill,
            source_incarnation=item.prefill_incarnation,
            target_instance=item.decode,
            target_incarnation=item.decode_incarnation,
            blocks=item.prefill_blocks,
            kv_bytes=item.prefill_blocks * item.block_bytes,
            expires_at_ms=expiry_ms(item.deadline_ms),
        )
        capability = kv.Capability(mac=keys().sign(grant), expires_at_ms=grant.expires_at_ms)
        return capability.SerializeToString(deterministic=True)

    return sign


def prefix_signer(keys: Callable[[], Keyring]) -> Sign:
    """Signs what the source of an assignment's prefix may push: at most the blocks that the core counted on."""

    def sign(item: Assignment) -> bytes:
        source = item.prefix
        if source is None:
            return b""
        grant = Grant(
            kind=GrantKind.PREFIX,
            request_id=item.request_id,
            epoch=item.expected_epoch + 1,
            source_instance=source.instance_id,
            source_incarnation=source.incarnation,
            target_instance=item.prefill,
            target_incarnation=item.prefill_incarnation,
            blocks=source.blocks,
            kv_bytes=source.blocks * item.block_bytes,
            expires_at_ms=expiry_ms(item.deadline_ms),
        )
        capability = kv.Capability(mac=keys().sign(grant), expires_at_ms=grant.expires_at_ms, most_blocks=grant.blocks)
        return capability.SerializeToString(deterministic=True)

    return sign


def move_signer(keys: Callable[[], Keyring]) -> Callable[[Grant], bytes]:
    """Signs moves: the blocks of the grant are the most that may come."""

    def sign(grant: Grant) -> bytes:
        mac = keys().sign(grant)
        return kv.Capability(mac=mac, expires_at_ms=grant.expires_at_ms, most_blocks=grant.blocks).SerializeToString(
            deterministic=True
        )

    return sign
