"""A capability opens one hand-off, until it expires or the hand-off is over."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.control.effects import Assignment
from orchestrator.domain.ids import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.runtime.capabilities import signer
from protos.contract.capability import GRACE_MS, Keyring
from protos.contract.errors import Unauthenticated
from protos.wire import kv
from workers.kv_transfer.authority import Authority, StoreClock

RING = Keyring([b"k" * 32])
BLOCK_BYTES = 1024
SIGN = signer(lambda: RING)


def assigned(request_id: str = "r1", deadline_ms: int = 5_000) -> Assignment:
    return Assignment(
        RequestId(request_id), Epoch(2), InstanceId("p"), Incarnation(3), InstanceId("d"), Incarnation(4), 6, 8, BLOCK_BYTES,
        deadline_ms,
    )  # fmt: skip


def claim(request_id: str = "r1", deadline_ms: int = 5_000, **changes: Any) -> kv.OpenRequest:
    capability = kv.Capability.FromString(SIGN(assigned(request_id, deadline_ms)))
    values: dict[str, Any] = {
        "request_id": request_id, "epoch": 3, "source_instance": "p", "source_incarnation": 3, "target_instance": "d",
        "target_incarnation": 4, "num_blocks": 6, "capability": capability,
    }  # fmt: skip
    return kv.OpenRequest(**(values | changes))


def authority(now_ms: int = 1_000, max_spent: int = 100) -> tuple[Authority, list[float]]:
    time_s = [0.0]
    clock = StoreClock(lambda: time_s[0])
    clock.heard(now_ms)
    return Authority(lambda: RING, clock, max_spent), time_s


def test_what_the_core_signs_is_what_the_receiver_checks() -> None:
    guard, _ = authority()
    guard.admit(claim(), BLOCK_BYTES, is_here=False)
    guard.admit(claim(), BLOCK_BYTES, is_here=False)  # after a broken stream


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": "r2"}, {"epoch": 4}, {"source_instance": "q"}, {"source_incarnation": 4}, {"target_instance": "e"},
        {"target_incarnation": 5}, {"num_blocks": 7}, {"capability": kv.Capability()},
        {"capability": kv.Capability(mac=b"x" * 36, expires_at_ms=5_000 + GRACE_MS)},
    ],
)  # fmt: skip
def test_every_other_claim_is_refused(changes: dict[str, Any]) -> None:
    guard, _ = authority()
    message = claim()
    for name, value in changes.items():
        if name == "capability":
            message.capability.CopyFrom(value)
        else:
            setattr(message, name, value)
    with pytest.raises(Unauthenticated):
        guard.admit(message, BLOCK_BYTES, is_here=False)


def test_the_bytes_of_a_block_are_signed_and_the_expiry_cannot_be_moved() -> None:
    guard, _ = authority()
    with pytest.raises(Unauthenticated, match="size and expiry"):
        guard.admit(claim(), BLOCK_BYTES + 1, is_here=False)
    later = claim()
    later.capability.expires_at_ms += 1
    with pytest.raises(Unauthenticated, match="size and expiry"):
        guard.admit(later, BLOCK_BYTES, is_here=False)


def test_it_expires_on_the_clock_of_redis_and_not_before_the_deadline_was_dealt_with() -> None:
    guard, time_s = authority(now_ms=1_000)
    time_s[0] = 3.9 + GRACE_MS / 1000
    guard.admit(claim(), BLOCK_BYTES, is_here=False)
    time_s[0] = 4.0 + GRACE_MS / 1000
    with pytest.raises(Unauthenticated, match="expired 0 ms ago"):
        guard.admit(claim(), BLOCK_BYTES, is_here=True)


def test_a_hand_off_that_is_over_is_used_up_except_where_it_is_remembered() -> None:
    guard, _ = authority()
    guard.admit(claim(), BLOCK_BYTES, is_here=False)
    guard.spend("r1", 3)
    guard.spend("r1", 3)
    guard.admit(claim(), BLOCK_BYTES, is_here=True)
    with pytest.raises(Unauthenticated, match="used already"):
        guard.admit(claim(), BLOCK_BYTES, is_here=False)


def test_the_table_of_used_ones_is_bounded_and_empties_with_time() -> None:
    guard, time_s = authority(max_spent=10)
    for at in range(50):
        name = f"r{at}"
        guard.admit(claim(name, 5_000 + at), BLOCK_BYTES, is_here=False)
        guard.spend(name, 3)
    assert len(guard._spent) == len(guard._expiries) == 10
    time_s[0] = 60.0
    with pytest.raises(Unauthenticated, match="expired"):
        guard.admit(claim(), BLOCK_BYTES, is_here=False)
    assert not guard._spent and not guard._expiries


def test_nothing_is_signed_for_a_request_that_stays_where_it_is() -> None:
    item = assigned()
    stays = Assignment(item.request_id, item.expected_epoch, item.decode, item.decode_incarnation, item.decode,
                       item.decode_incarnation, 0, 8, BLOCK_BYTES, 5_000)  # fmt: skip
    assert SIGN(stays) == b""
