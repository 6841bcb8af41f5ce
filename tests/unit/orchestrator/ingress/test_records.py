"""What Redis says of a request and what becomes of the stream."""

from __future__ import annotations

import dataclasses

import pytest

from configs.model_card import oracle_card
from orchestrator.ingress.metrics import Histogram
from orchestrator.ingress.model import load_served_model
from orchestrator.ingress.records import ended_stream_of, error_of_state, stream_of, tenant_salt
from orchestrator.ingress.streams import Delivery, Ending, FinishReason, RequestStream
from orchestrator.ingress.verdicts import Behind, Ended, NotOurs, Running, Superseded, judge
from orchestrator.store.replies import Look, ResumeReply
from protos.contract.errors import (
    AutanError,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    OutOfBlocks,
    PoisonRequest,
    StoreUnavailable,
    UnavailableError,
)
from protos.contract.redis_names import Code, pack_tokens
from protos.wire import common, error_to_wire, store

MODEL = load_served_model("oracle", dataclasses.replace(oracle_card(), context_tokens=512), None)


def a_spec(**sampling: object) -> common.RequestSpec:
    return common.RequestSpec(
        request_id="r-1",
        eos_token_ids=[2],
        stop=["END"],
        sampling=common.Sampling(max_tokens=8, **sampling),  # type: ignore[arg-type]
    )


def a_stream() -> RequestStream:
    stream = stream_of(a_spec(), MODEL)
    stream.receive(Delivery(2, 0, [70, 71, 72]))
    stream.journaled_to(3)
    return stream


@pytest.mark.parametrize(
    ("look", "refused_epoch", "expected"),
    [
        (Look("DECODING", 2, 3), None, Running()),
        (Look("QUEUED", 2, 3), None, Running()),
        (Look("ASSIGNED", 3, 2), None, Superseded(3, 2)),
        (Look("DECODING", 3, 2), 2, Superseded(3, 2)),
        (Look("DECODING", 2, 3), 2, NotOurs()),
        (Look("DECODING", 2, 3), 1, Running()),
        (Look("DECODING", 2, 4), None, Behind()),
        (Look("QUEUED", 2, 4), 1, Behind()),
        (Look("DECODING", 2, 4), 2, NotOurs()),  # somebody else writes it
        (Look("DECODING", 3, 4), None, Superseded(3, 4)),
    ],
)
def test_judgements(look: Look, refused_epoch: int | None, expected: object) -> None:
    assert judge(a_stream(), look, refused_epoch) == expected


@pytest.mark.parametrize(
    ("look", "error"),
    [
        (Look(""), StoreUnavailable),
        (Look("CANCELLED", 3, 3, "operator"), Cancelled),
        (Look("EXPIRED", 2, 3, "deadline"), DeadlineExceeded),
        (Look("DEAD", 2, 3, "poison"), PoisonRequest),
        (Look("FAILED", 2, 3, "error"), EngineFailure),
        (Look("DONE", 2, 3, "stop"), UnavailableError),  # finished by another ingress: there is more than is here
        (Look("MELTED", 2, 3), UnavailableError),
    ],
)
def test_ends_elsewhere(look: Look, error: type[AutanError]) -> None:
    judged = judge(a_stream(), look) if look.state != "MELTED" else Ended(error_of_state("r-1", "MELTED", "", b""))
    assert isinstance(judged, Ended) and isinstance(judged.outcome, error)
    assert "r-1" in str(judged.outcome)


def test_done_after_a_finish_whose_reply_was_lost_is_our_own_end() -> None:
    stream = a_stream()
    stream.receive(Delivery(2, 3, [73], FinishReason.STOP))
    assert judge(stream, Look("DONE", 2, 4, "stop")) == Ended(Ending(FinishReason.STOP, 4))


def test_a_stored_error_comes_back_as_it_was() -> None:
    stored = store.StoredError(error=error_to_wire(OutOfBlocks("no blocks", 2.0)), instance_id="d-0")
    error = error_of_state("r-1", "FAILED", "error", stored.SerializeToString())
    assert type(error) is OutOfBlocks and (error.message, error.retry_after_s) == ("no blocks", 2.0)


@pytest.mark.parametrize(
    ("text", "reason", "ending"),
    [
        (b"abc", "length", Ending(FinishReason.LENGTH, 3)),
        (b"abc", "stop", Ending(FinishReason.STOP, 3)),
        (b"a E", "length", Ending(FinishReason.LENGTH, 3, "", "E")),
        (b"aEND", "stop", Ending(FinishReason.STOP, 4, "END")),
        (b"ab\xf0\x9f", "length", Ending(FinishReason.LENGTH, 4, "", "\N{REPLACEMENT CHARACTER}")),
    ],
)
def test_an_ended_request_reads_as_it_did_when_it_ran(text: bytes, reason: str, ending: Ending) -> None:
    reply = ResumeReply(Code.OK, "DONE", 2, len(text), pack_tokens([3 + byte for byte in text]), reason)
    stream = ended_stream_of(a_spec(), MODEL, reply)
    assert stream.outcome == ending
    chunk = stream.read(0, 99)
    assert chunk is not None and len(chunk.token_ids) == len(text)


def test_a_journal_that_holds_its_last_token_needs_no_worker() -> None:
    ends = {
        "eos": (a_spec(), [70, 2], FinishReason.STOP),
        "eos ignored": (a_spec(ignore_eos=True), [70, 2], None),
        "eos before min_tokens": (a_spec(min_tokens=2), [70, 2], None),
        "stop token": (a_spec(stop_token_ids=[9]), [70, 9], FinishReason.STOP),
        "all of them": (a_spec(), [70] * 8, FinishReason.LENGTH),
        "stop string": (a_spec(), [3 + byte for byte in b"END"], FinishReason.STOP),
    }
    for name, (spec, journal, reason) in ends.items():
        ending = stream_of(spec, MODEL, pack_tokens(journal), epoch=1).ending
        assert (ending.reason if ending else None) is reason, name


def test_tenants_have_salts_of_their_own() -> None:
    assert len(tenant_salt("a")) == 16 and tenant_salt("a") == tenant_salt("a") != tenant_salt("b")


def test_quantiles_are_upper_bounds() -> None:
    histogram = Histogram()
    assert histogram.quantile_ms(0.5) == 0
    for milliseconds in (3, 3, 3, 40, 900_000):
        histogram.observe(milliseconds / 1000)
    assert [histogram.quantile_ms(share) for share in (0.5, 0.8, 0.99)] == [5, 50, 600_000]
    assert histogram.snapshot("x")["x_count"] == 5
