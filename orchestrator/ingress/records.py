"""The request as Redis and the workers keep it, and the stream that belongs to it. Pure."""

from __future__ import annotations

import hashlib

from orchestrator.ingress.grammar import to_wire
from orchestrator.ingress.model import ServedModel
from orchestrator.ingress.streams import Bounds, Ending, FinishReason, Outcome, RequestStream
from orchestrator.ingress.validate import ValidRequest
from orchestrator.store.replies import ResumeReply
from protos.contract.errors import (
    AutanError,
    Cancelled,
    DeadlineExceeded,
    EngineFailure,
    PoisonRequest,
    StoreUnavailable,
)
from protos.contract.redis_names import pack_tokens, unpack_tokens
from protos.wire import common, store, wire_to_error

SALT_BYTES = 16


def tenant_salt(tenant: str) -> bytes:
    """Keeps the prefix cache of one tenant apart from every other's."""
    return hashlib.blake2b(tenant.encode(), digest_size=SALT_BYTES, person=b"autan-tenant").digest()


def spec_of(valid: ValidRequest, request_id: str, tenant: str, model: ServedModel) -> common.RequestSpec:
    """The record that is submitted. It never changes."""
    sampling = valid.checked.sampling
    return common.RequestSpec(
        request_id=request_id,
        tenant=tenant,
        model=model.name,
        prompt_token_ids=pack_tokens(valid.prompt_token_ids),
        sampling=common.Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=valid.seed,
            max_tokens=valid.max_tokens,
            min_tokens=sampling.min_tokens,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=sampling.ignore_eos,
            repetition_penalty=sampling.logits.repetition_penalty,
            presence_penalty=sampling.logits.presence_penalty,
            frequency_penalty=sampling.logits.frequency_penalty,
            logit_bias=dict(sampling.logits.logit_bias),
            logprobs=sampling.logits.logprobs,
        ),
        cache_salt=tenant_salt(tenant),
        eos_token_ids=model.card.eos_token_ids,
        priority=valid.checked.priority,
        stop=sampling.stop,
        grammar=to_wire(sampling.grammar),
    )


def stream_of(spec: common.RequestSpec, model: ServedModel, journal: bytes = b"", epoch: int = 0) -> RequestStream:
    """The stream of a request with the tokens that Redis has of it."""
    sampling = spec.sampling
    eos = () if sampling.ignore_eos else spec.eos_token_ids
    bounds = Bounds(
        max_tokens=sampling.max_tokens,
        vocab_size=model.card.vocab_size,
        # A grammar keeps min_tokens in its masks as far as it can: an end that it lets through is one.
        min_tokens=0 if spec.HasField("grammar") else sampling.min_tokens,
        stop_token_ids=frozenset([*sampling.stop_token_ids, *eos]),
        has_logprobs=sampling.HasField("logprobs"),
    )
    rules = model.text_rules(tuple(spec.stop), sampling.min_tokens)
    return RequestStream(spec.request_id, bounds, rules, unpack_tokens(journal), epoch)


def ended_stream_of(spec: common.RequestSpec, model: ServedModel, reply: ResumeReply) -> RequestStream:
    """The stream of a request that is terminal in Redis, ready to be read."""
    stream = stream_of(spec, model, reply.tokens)
    outcome = outcome_of(spec.request_id, reply.state, reply.reason, reply.error, stream.ending)
    stream.end(outcome or stream.close(_finish_reason(reply.reason)))
    return stream


def outcome_of(request_id: str, state: str, reason: str, error: bytes, ending: Ending | None) -> Outcome | None:
    """What a terminal state means to the client; None for DONE when `ending` does not say how."""
    if state == "DONE":
        return ending
    return error_of_state(request_id, state, reason, error)


def error_of_state(request_id: str, state: str, reason: str, error: bytes) -> AutanError:
    """The error behind a terminal state other than DONE."""
    stored = store.StoredError()
    if error:
        stored.ParseFromString(error)
    where = f" on {stored.instance_id}" if stored.instance_id else ""
    match state:
        case "CANCELLED":
            return Cancelled(f"request {request_id} was cancelled ({reason or 'no reason given'})")
        case "EXPIRED":
            return DeadlineExceeded(f"request {request_id} did not end within its timeout; its tokens so far can be resumed")
        case "DEAD":
            detail = f": {stored.error.message}" if stored.error.message else ""
            return PoisonRequest(f"request {request_id} ended every worker that held it{where}{detail}; it is not tried again")
        case "FAILED" if stored.error.reason:
            return wire_to_error(stored.error)
        case "FAILED":
            return EngineFailure(f"request {request_id} failed{where}; send it again under a new id")
        case _:
            return StoreUnavailable(f"request {request_id} is in the unknown state {state!r}; is another version running?")


def lost_error(request_id: str) -> AutanError:
    """For a request that Redis does not know any more although it had not ended."""
    return StoreUnavailable(f"Redis has lost request {request_id} (wiped, or failed over): send it again under a new id")


def lost_tokens_error(request_id: str, first: int) -> AutanError:
    """For tokens that were acknowledged to their worker, so that it has forgotten them, and that Redis has lost."""
    return StoreUnavailable(
        f"Redis has lost request {request_id} from token {first} on, and its worker has not got it any more "
        "(killed before it wrote, or failed over): send it again under a new id"
    )


def merge_timeline(known: common.Timeline, news: common.Timeline) -> None:
    """Adds what a worker says to what is known: a field that it set wins, a field that it left at zero does not."""
    known.MergeFrom(news)


def _finish_reason(reason: str) -> FinishReason:
    return FinishReason.LENGTH if reason == FinishReason.LENGTH else FinishReason.STOP
