"""What clients are told, as messages. Pure."""

from __future__ import annotations

from orchestrator.ingress.live import LiveStream
from orchestrator.ingress.streams import Chunk, Ending, FinishReason
from protos.contract.token_logprobs import unpack_logprobs
from protos.wire import common, inference

_FINISH = {
    FinishReason.STOP: common.FINISH_REASON_STOP,
    FinishReason.LENGTH: common.FINISH_REASON_LENGTH,
}


def accepted_event(live: LiveStream, choice: int = 0) -> inference.GenerateEvent:
    """The request, or one choice of it, is accepted."""
    spec = live.spec
    accepted = inference.Accepted(
        request_id=spec.request_id, model=spec.model, prompt_tokens=live.prompt_tokens, seed=spec.sampling.seed
    )
    return inference.GenerateEvent(accepted=accepted, choice=choice)


def tokens_event(chunk: Chunk, choice: int = 0) -> inference.GenerateEvent:
    """New tokens."""
    tokens = inference.Tokens(
        first_index=chunk.first_index,
        ids=chunk.token_ids,
        text=chunk.text,
        logprobs=[_logprobs(packed) for packed in chunk.logprobs],
    )
    return inference.GenerateEvent(tokens=tokens, choice=choice)


def finished_event(live: LiveStream, ending: Ending, choice: int = 0) -> inference.GenerateEvent:
    """The end of the request, or of one choice."""
    finished = inference.Finished(
        reason=_FINISH[ending.reason],
        prompt_tokens=live.prompt_tokens,
        completion_tokens=ending.num_tokens,
        timeline=live.timeline,
        stop=ending.stop,
        text=ending.text,
    )
    return inference.GenerateEvent(finished=finished, choice=choice)


def _logprobs(packed: bytes) -> inference.TokenLogprobs:
    if not packed:
        return inference.TokenLogprobs(absent=True)
    logprob, top_ids, top_logprobs = unpack_logprobs(packed)
    return inference.TokenLogprobs(logprob=logprob, top_ids=top_ids, top_logprobs=top_logprobs)
