"""Whatever changes in an end frame on its way, or comes from another hand-off, does not verify."""

from __future__ import annotations

import random

import pytest
from google.protobuf.message import DecodeError

from protos.contract.errors import BadFrame, DigestMismatch
from protos.contract.redis_names import pack_tokens
from protos.contract.token_logprobs import pack_logprobs
from protos.wire import common, kv
from workers.kv_transfer.digest import DigestScope

SCOPE = DigestScope("fingerprint", "r1", 5)


def end() -> kv.EndFrame:
    made = kv.EndFrame(
        num_tokens=200, next_token_ids=pack_tokens([7, 9]), first_output_index=3, since_prefill_s=0.25,
        timeline=common.Timeline(queue_s=0.5, prefill_instance="prefill-0", attempts=1),
        next_logprobs=[pack_logprobs(-0.5, (7,), (-0.5,)), pack_logprobs(-1.5, (9,), (-1.5,))],
    )  # fmt: skip
    made.digest = SCOPE.of_end(made)
    return made


def test_what_was_sent_verifies() -> None:
    SCOPE.check_end(kv.EndFrame.FromString(end().SerializeToString()))


def test_no_flipped_bit_verifies() -> None:
    raw = end().SerializeToString()
    rng = random.Random(1)
    refused = 0
    for bit in rng.sample(range(8 * len(raw)), min(1500, 8 * len(raw))):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            frame = kv.EndFrame.FromString(bytes(changed))
        except DecodeError:
            continue  # refused as malformed before anybody looks at it
        with pytest.raises((BadFrame, DigestMismatch)):
            SCOPE.check_end(frame)
        refused += 1
    assert refused > 500, "most of the flips are still messages"


@pytest.mark.parametrize(
    "scope", [DigestScope("other", "r1", 5), DigestScope("fingerprint", "r2", 5), DigestScope("fingerprint", "r1", 6)]
)
def test_the_end_of_another_hand_off_does_not_verify(scope: DigestScope) -> None:
    with pytest.raises(DigestMismatch):
        scope.check_end(end())


def test_parts_do_not_run_into_each_other() -> None:
    ones, twos = end(), end()
    del ones.next_logprobs[:], twos.next_logprobs[:]
    ones.next_logprobs.extend([b"ab", b"c"])
    twos.next_logprobs.extend([b"a", b"bc"])
    assert SCOPE.of_end(ones) != SCOPE.of_end(twos)


def test_an_end_without_a_digest_is_refused() -> None:
    frame = end()
    frame.ClearField("digest")
    with pytest.raises(BadFrame):
        SCOPE.check_end(frame)
