"""What a sender claims is compared with what Redis assigned, field by field."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from protos.contract.errors import AutanError, BadFrame, FingerprintMismatch, StaleEpoch, StaleIncarnation
from protos.contract.redis_names import pack_tokens
from protos.contract.token_logprobs import pack_logprobs
from protos.wire import common, kv
from workers.engine_api.types import EngineRequest, KvLayout, SamplingParams
from workers.kv_transfer.block_names import sequence_hashes
from workers.kv_transfer.claims import Addressee, Expectation, check_addressee, check_end, check_expected

LAYOUT = KvLayout(block_tokens=4, num_layers=2, row_bytes=8, dtype="bytes", name="oracle")
FINGERPRINT = common.Fingerprint(model="m", dtype="bytes", block_tokens=4, num_layers=2, row_bytes=8, kv_layout="oracle")
HERE = Addressee(instance_id="d", incarnation=3, fingerprint=FINGERPRINT, layout=LAYOUT, vocab_size=100)
REQUEST = EngineRequest(
    request_id="r1", epoch=5, prompt=tuple(range(9)), output=(7,), sampling=SamplingParams(max_tokens=4), cache_salt=b"s"
)
EXPECTED = Expectation(request=REQUEST, source_instance="p", source_incarnation=2)


def claim(**changes: Any) -> kv.OpenRequest:
    values: dict[str, Any] = {
        "request_id": "r1", "epoch": 5, "source_instance": "p", "source_incarnation": 2, "target_instance": "d",
        "target_incarnation": 3, "fingerprint": FINGERPRINT, "num_tokens": 10, "num_blocks": 3,
        "block_hashes": sequence_hashes(FINGERPRINT, REQUEST), "layers_per_group": 2,
    }  # fmt: skip
    return kv.OpenRequest(**(values | changes))


def check(message: kv.OpenRequest) -> None:
    check_addressee(message, HERE)
    check_expected(message, EXPECTED, HERE)


def test_the_right_claim_passes() -> None:
    check(claim())


def fingerprint(**changes: Any) -> common.Fingerprint:
    changed = common.Fingerprint()
    changed.CopyFrom(FINGERPRINT)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"request_id": "../x"}, BadFrame),
        ({"request_id": ""}, BadFrame),
        ({"source_instance": "a b"}, BadFrame),
        ({"target_instance": "other"}, StaleIncarnation),
        ({"target_incarnation": 2}, StaleIncarnation),
        ({"target_incarnation": 4}, StaleIncarnation),
        ({"epoch": 4}, StaleEpoch),
        ({"epoch": 2**64 - 1}, StaleEpoch),
        ({"source_instance": "p2"}, StaleIncarnation),
        ({"source_incarnation": 1}, StaleIncarnation),
        ({"num_tokens": 11}, BadFrame),
        ({"num_tokens": 2**32 - 1, "num_blocks": 2**30}, BadFrame),
        ({"num_tokens": 0, "num_blocks": 0}, BadFrame),
        ({"num_blocks": 4}, BadFrame),
        ({"layers_per_group": 1}, BadFrame),
        ({"block_hashes": b""}, BadFrame),
        ({"block_hashes": b"\0" * 32}, BadFrame),
        ({"fingerprint": common.Fingerprint()}, FingerprintMismatch),
    ],
)
def test_every_wrong_field_is_refused(changes: dict[str, Any], error: type[AutanError]) -> None:
    with pytest.raises(error):
        check(claim(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "n"}, {"architecture": "llama"}, {"weights_digest": "1"}, {"tokenizer_digest": "1"}, {"dtype": "float32"},
        {"block_tokens": 8}, {"num_layers": 3}, {"row_bytes": 16}, {"kv_layout": "gqa:k+v"}, {"protocol_version": 3},
    ],
)  # fmt: skip
def test_a_fingerprint_mismatch_names_the_field(changes: dict[str, Any]) -> None:
    with pytest.raises(FingerprintMismatch, match=next(iter(changes))):
        check_addressee(claim(fingerprint=fingerprint(**changes)), HERE)


def end(**changes: Any) -> kv.EndFrame:
    values: dict[str, Any] = {"num_tokens": 10, "next_token_ids": pack_tokens([99]), "first_output_index": 1}
    return kv.EndFrame(**(values | changes))


def test_the_right_end_passes() -> None:
    assert check_end(end(), EXPECTED, HERE, 10) == (99,)
    assert check_end(end(next_token_ids=pack_tokens([0, 1])), EXPECTED, HERE, 10) == (0, 1)
    assert check_end(end(next_logprobs=[pack_logprobs(-1.0, [99], [-1.0])]), EXPECTED, HERE, 10) == (99,)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tokens": 9},
        {"next_token_ids": b""},
        {"next_token_ids": b"\0\0\0"},
        {"next_token_ids": pack_tokens([100])},
        {"next_token_ids": pack_tokens([0] * 17)},
        {"first_output_index": 0},
        {"first_output_index": 2},
        {"next_logprobs": [b""]},
        {"next_logprobs": [b"1234", b"1234"]},
        {"next_logprobs": [b"12345"]},
        {"next_logprobs": [pack_logprobs(-1.0, [100], [-1.0])]},
    ],
)
def test_every_wrong_end_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadFrame):
        check_end(end(**changes), EXPECTED, HERE, 10)


MOVED = Expectation(
    request=replace(REQUEST, sampling=SamplingParams(max_tokens=9)), source_instance="p", source_incarnation=2, is_move=True
)


@pytest.mark.parametrize(("num_tokens", "fits"), [(9, False), (10, False), (11, True), (17, True), (18, False)])
def test_a_move_makes_room_for_rows_to_come_but_not_beyond_the_end(num_tokens: int, fits: bool) -> None:
    message = claim(num_tokens=num_tokens, num_blocks=-(-num_tokens // 4))
    if fits:
        check_expected(message, MOVED, HERE)
    else:
        with pytest.raises(BadFrame):
            check_expected(message, MOVED, HERE)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"num_tokens": 9, "next_token_ids": b""}, ()),
        ({}, (99,)),
        ({"next_logprobs": [b""]}, (99,)),
        ({"num_tokens": 12, "next_token_ids": pack_tokens([1, 2, 3])}, (1, 2, 3)),
        ({"num_tokens": 13, "next_token_ids": pack_tokens([1, 2, 3, 4])}, None),
        ({"num_tokens": 8, "next_token_ids": b""}, None),
        ({"num_tokens": 11}, None),
        ({"num_tokens": 9}, None),
        ({"next_token_ids": pack_tokens([100])}, None),
        ({"next_logprobs": [b"12345"]}, None),
        ({"first_output_index": 0}, None),
    ],
)
def test_rows_and_tokens_of_a_move_fit_each_other(changes: dict[str, Any], tokens: tuple[int, ...] | None) -> None:
    if tokens is not None:
        assert check_end(end(**changes), MOVED, HERE, 12) == tokens
        return
    with pytest.raises(BadFrame):
        check_end(end(**changes), MOVED, HERE, 12)
