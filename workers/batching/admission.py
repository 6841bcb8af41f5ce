"""What an engine accepts. Checks only; nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence

from protos.contract.errors import BadFrame, InvalidRequest, OutOfBlocks, PromptTooLong
from workers.batching.block_pool import BlockPool
from workers.batching.sequence import Sequence as Waiting
from workers.engine_api.types import EngineRequest, ModelIdentity, Phase


def check_request(request: EngineRequest, identity: ModelIdentity) -> None:
    """Raises InvalidRequest, or PromptTooLong when no token could follow within the context."""
    name = request.request_id
    if not request.prompt:
        raise InvalidRequest(f"{name}: the prompt is empty")
    for what, tokens in (("prompt", request.prompt), ("output", request.output)):
        if not tokens_in_vocabulary(tokens, identity.vocab_size):
            raise InvalidRequest(f"{name}: a token id of the {what} is outside 0..{identity.vocab_size - 1}")
    _check_sampling(request, identity)
    if len(request.output) >= request.sampling.max_tokens:
        raise InvalidRequest(f"{name}: {len(request.output)} of max_tokens={request.sampling.max_tokens} are there already")
    known = len(request.prompt) + len(request.output)
    if known >= identity.context_tokens:
        raise PromptTooLong(f"{name}: {known} tokens leave no room in a context of {identity.context_tokens}")


def _check_sampling(request: EngineRequest, identity: ModelIdentity) -> None:
    name, sampling = request.request_id, request.sampling
    if sampling.needs_logits and not identity.has_logits:
        raise InvalidRequest(f"{name}: model {identity.model} has no logits; leave out penalties, logit_bias and logprobs")
    if not tokens_in_vocabulary([token_id for token_id, _ in sampling.logit_bias], identity.vocab_size):
        raise InvalidRequest(f"{name}: a token id of logit_bias is outside 0..{identity.vocab_size - 1}")


def tokens_in_vocabulary(tokens: Sequence[int], vocab_size: int) -> bool:
    return not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size)


def check_fits(request: EngineRequest, identity: ModelIdentity, block_tokens: int, num_blocks: int) -> None:
    """Raises OutOfBlocks when even an empty pool could not take the sequence to its end."""
    rows = len(request.prompt) + len(request.output)
    if request.phase is Phase.FULL:
        # The last token is never fed back: it needs no row.
        rows = min(len(request.prompt) + request.sampling.max_tokens, identity.context_tokens) - 1
    blocks = -(-rows // block_tokens)
    if blocks > num_blocks:
        raise OutOfBlocks(f"{request.request_id}: needs {blocks} KV blocks, the whole pool has {num_blocks}")


def check_ahead(request: EngineRequest, num_tokens: int, ahead_tokens: int) -> None:
    """Raises InvalidRequest when rows of later outputs are not behind all known ones, or beyond the request's end."""
    if not ahead_tokens:
        return
    known = len(request.prompt) + len(request.output)
    most = len(request.prompt) + request.sampling.max_tokens - 1
    if ahead_tokens < 0 or num_tokens != known or num_tokens + ahead_tokens > most:
        raise InvalidRequest(f"{request.request_id}: {num_tokens} + {ahead_tokens} KV rows, {known} known, at most {most}")


def check_handed_tokens(
    request: EngineRequest, tokens: Sequence[int], num_tokens: int, room_tokens: int, identity: ModelIdentity
) -> None:
    """Raises BadFrame unless a sequence can go on behind these sampled tokens and `num_tokens` KV rows."""
    name = request.request_id
    known = len(request.prompt) + len(request.output) + len(tokens)
    if known <= num_tokens:
        raise BadFrame(f"{name}: no sampled token was handed over, there is nothing to go on from")
    if not 0 < num_tokens <= room_tokens:
        raise BadFrame(f"{name}: {num_tokens} KV rows where there is room for {room_tokens}")
    if not tokens_in_vocabulary(tokens, identity.vocab_size):
        raise BadFrame(f"{name}: a sampled token is outside 0..{identity.vocab_size - 1}")
    outputs = len(request.output) + len(tokens)
    if outputs >= request.sampling.max_tokens or len(request.prompt) + outputs >= identity.context_tokens:
        raise BadFrame(f"{name}: the tokens handed over end the request")


def check_room(blocks: int, waiting: Sequence[Waiting], pool: BlockPool) -> None:
    """Raises OutOfBlocks when an import of so many blocks would take what preempted sequences need to come back."""
    owed = sum(sequence.blocks_for_known for sequence in waiting if sequence.preempted)
    if owed and blocks + owed > pool.available:
        raise OutOfBlocks(f"{blocks} KV blocks asked for, {owed} are owed to preempted sequences")
