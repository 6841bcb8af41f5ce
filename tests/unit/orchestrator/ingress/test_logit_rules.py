from __future__ import annotations

import dataclasses

import pytest

from configs.model_card import oracle_card
from orchestrator.ingress.logit_rules import LogitRules, check_logit_rules
from protos.contract.errors import InvalidRequest
from protos.contract.token_logprobs import MAX_PACKED_BYTES, is_packed, pack_logprobs, unpack_logprobs
from protos.wire import inference

CARD = dataclasses.replace(oracle_card(), has_logits=True)


def test_what_is_in_range_is_taken_as_it_is() -> None:
    params = inference.SamplingParams(
        repetition_penalty=0.01, presence_penalty=-2.0, frequency_penalty=2.0, logit_bias={258: -100.0, 0: 100.0}, logprobs=20
    )
    expected = LogitRules(
        repetition_penalty=0.01,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=((0, 100.0), (258, -100.0)),
        logprobs=20,
    )
    assert check_logit_rules(params, CARD) == expected
    assert check_logit_rules(inference.SamplingParams(), CARD) == LogitRules()


def test_rules_that_change_nothing_need_no_logits() -> None:
    neutral = inference.SamplingParams(repetition_penalty=1.0, presence_penalty=-0.0, frequency_penalty=0.0)
    assert check_logit_rules(neutral, oracle_card()) == LogitRules()
    with pytest.raises(InvalidRequest, match="no logits"):
        check_logit_rules(inference.SamplingParams(logprobs=0), oracle_card())


@pytest.mark.parametrize("fields", [{"repetition_penalty": 0.0}, {"logit_bias": {259: 1.0}}, {"logprobs": 21}])
def test_refusals_name_the_field(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=rf"sampling\.{next(iter(fields))}"):
        check_logit_rules(inference.SamplingParams(**fields), CARD)  # type: ignore[arg-type]


def test_logprobs_survive_the_wire() -> None:
    for count in (0, 1, 20):
        packed = pack_logprobs(-1.5, range(count), [-float(i) for i in range(count)])
        assert unpack_logprobs(packed) == (-1.5, tuple(range(count)), tuple(-float(i) for i in range(count)))
    for size in (0, 3, 8, MAX_PACKED_BYTES + 8):
        assert not is_packed(bytes(size))
        with pytest.raises(ValueError, match="no logprobs"):
            unpack_logprobs(bytes(size))
