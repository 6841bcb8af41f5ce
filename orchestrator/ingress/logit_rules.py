"""The checks of what a request asks of the model's logits: penalties, bias, logprobs. Pure; see validate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.model_card import ModelCard
from protos.contract.errors import InvalidRequest
from protos.contract.token_logprobs import MAX_ALTERNATIVES
from protos.wire import inference

MAX_LOGIT_BIAS = 1024
MAX_BIAS = 100.0
_RANGES = {
    "repetition_penalty": (0.01, 10.0, 1.0),
    "presence_penalty": (-2.0, 2.0, 0.0),
    "frequency_penalty": (-2.0, 2.0, 0.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRules:
    """Checked; the defaults change nothing."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


def check_logit_rules(params: inference.SamplingParams, card: ModelCard) -> LogitRules:
    """Raises InvalidRequest, naming the field, the value and the range, or that the model has no logits."""
    rules = LogitRules(
        **{field: _real(params, field) for field in _RANGES},
        logit_bias=_check_bias(params, card),
        logprobs=_check_logprobs(params, card),
    )
    if rules != LogitRules() and not card.has_logits:
        raise InvalidRequest(f"sampling: the {card.architecture} model has no logits; no penalties, logit_bias and logprobs")
    return rules


def _real(params: inference.SamplingParams, field: str) -> float:
    least, most, default = _RANGES[field]
    if not params.HasField(field):  # type: ignore[arg-type,unused-ignore]
        return default
    value: float = getattr(params, field)
    if not math.isfinite(value) or not least <= value <= most:
        raise InvalidRequest(f"sampling.{field}: {value} is not between {least:g} and {most:g}")
    return value + 0.0  # no negative zero


def _check_bias(params: inference.SamplingParams, card: ModelCard) -> tuple[tuple[int, float], ...]:
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"sampling.logit_bias: {len(params.logit_bias)} entries, more than {MAX_LOGIT_BIAS}")
    entries = tuple(sorted(params.logit_bias.items()))
    for token_id, bias in entries:
        if not 0 <= token_id < card.vocab_size:
            raise InvalidRequest(f"sampling.logit_bias: {token_id} is no token id between 0 and {card.vocab_size - 1}")
        if not math.isfinite(bias) or abs(bias) > MAX_BIAS:
            raise InvalidRequest(f"sampling.logit_bias[{token_id}]: {bias} is not between {-MAX_BIAS:g} and {MAX_BIAS:g}")
    return entries


def _check_logprobs(params: inference.SamplingParams, card: ModelCard) -> int | None:
    if not params.HasField("logprobs"):
        return None
    most = min(MAX_ALTERNATIVES, card.vocab_size)
    if not 0 <= params.logprobs <= most:
        raise InvalidRequest(f"sampling.logprobs: {params.logprobs} is not between 0 and {most}")
    return params.logprobs
