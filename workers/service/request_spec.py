"""From an inbox message to what the engine runs. Pure; the bytes come from Redis and are checked all the same."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from protos.contract.errors import InvalidRequest
from protos.contract.grammar import ANY_OBJECT, Grammar, GrammarKind
from protos.contract.redis_names import unpack_tokens
from protos.wire import common
from workers.engine_api.types import EngineRequest, FinishReason, Phase, SamplingParams
from workers.service.store import InboxEntry


def engine_request(entry: InboxEntry, phase: Phase) -> EngineRequest:
    """The sequence to run. Raises InvalidRequest for a spec that cannot be read or belongs to another request."""
    try:
        spec = common.RequestSpec.FromString(entry.spec)
        prompt, output = unpack_tokens(spec.prompt_token_ids), unpack_tokens(entry.journal)
    except (DecodeError, ValueError) as error:
        raise InvalidRequest(f"{entry.request_id}: the stored spec or journal is damaged: {error}") from error
    if spec.request_id != entry.request_id:
        raise InvalidRequest(f"{entry.request_id}: the stored spec is of {spec.request_id!r}")
    return EngineRequest(
        request_id=entry.request_id,
        epoch=entry.epoch,
        prompt=tuple(prompt),
        output=tuple(output),
        sampling=sampling_params(spec),
        phase=phase,
        cache_salt=spec.cache_salt,
    )


def ended_already(request: EngineRequest, context_tokens: int) -> FinishReason | None:
    """How the output that Redis has ended; None while a token is to come.

    Whoever sampled the last token may be gone before the request was finished: then it is placed again with all its tokens.
    """
    sampling, output = request.sampling, request.output
    if output and output[-1] in sampling.stop_token_ids and len(output) > sampling.min_tokens:
        return FinishReason.STOP
    if output and (len(output) >= sampling.max_tokens or len(request.prompt) + len(output) >= context_tokens):
        return FinishReason.LENGTH
    return None


def journal_of(entry: InboxEntry) -> tuple[int, ...]:
    """The output that Redis knew when the message was made. Raises InvalidRequest for bytes that are no tokens."""
    try:
        return tuple(unpack_tokens(entry.journal))
    except ValueError as error:
        raise InvalidRequest(f"{entry.request_id}: the stored journal is damaged: {error}") from error


def sampling_params(spec: common.RequestSpec) -> SamplingParams:
    """How the engine draws; eos ends a sequence unless the request ignores it."""
    sampling = spec.sampling
    stops = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops.update(spec.eos_token_ids)
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p or 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        min_tokens=sampling.min_tokens,
        stop_token_ids=frozenset(stops),
        grammar=_grammar(spec),
        repetition_penalty=sampling.repetition_penalty or 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
    )


def _grammar(spec: common.RequestSpec) -> Grammar | None:
    """The grammar of the output. Raises InvalidRequest for a kind that this version does not know."""
    if not spec.HasField("grammar"):
        return None
    kind = spec.grammar.WhichOneof("kind")
    if kind is None:
        raise InvalidRequest(f"{spec.request_id}: the grammar is of an unknown kind; is the ingress of another version?")
    if kind == "json_object":
        return Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT)
    return Grammar(GrammarKind(kind), getattr(spec.grammar, kind))
