"""What a sender claims, checked before anything is allocated. Pure; every field is hostile input."""

from __future__ import annotations

from dataclasses import dataclass

from protos.contract.errors import BadFrame, FingerprintMismatch, StaleEpoch, StaleIncarnation
from protos.contract.redis_names import is_name, unpack_tokens
from protos.contract.token_logprobs import unpack_logprobs
from protos.wire import common, differing_fields, kv
from workers.engine_api.types import EngineRequest, KvLayout
from workers.kv_transfer.block_names import sequence_hashes
from workers.kv_transfer.encodings import MAX_OFFERED

MAX_NEXT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Addressee:
    """Who this process is now."""

    instance_id: str
    incarnation: int
    fingerprint: common.Fingerprint
    layout: KvLayout
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """A hand-off that Redis assigned to this instance, and all that is known of it from there."""

    request: EngineRequest
    source_instance: str
    source_incarnation: int
    is_move: bool = False  # the request decodes at the source meanwhile: more rows and tokens come than Redis knows of

    @property
    def num_tokens(self) -> int:
        """KV rows that must come; of a move, those of the tokens that are known here."""
        return len(self.request.prompt) + len(self.request.output)

    @property
    def most_tokens(self) -> int:
        """KV rows that may come."""
        if not self.is_move:
            return self.num_tokens
        # The last token is never fed back: it needs no row.
        return max(self.num_tokens, len(self.request.prompt) + self.request.sampling.max_tokens - 1)


def check_addressee(claim: kv.OpenRequest, here: Addressee) -> None:
    """The cheap checks that need no look-up.

    Raises BadFrame for malformed fields, StaleIncarnation when another process is meant, FingerprintMismatch with the
    names and values of the fields that differ.
    """
    for name in (claim.request_id, claim.source_instance, claim.target_instance):
        if not is_name(name):
            raise BadFrame("open: a request or instance id is malformed")
    if claim.target_instance != here.instance_id or claim.target_incarnation != here.incarnation:
        raise StaleIncarnation(
            f"open for {claim.target_instance} incarnation {claim.target_incarnation}; "
            f"this is {here.instance_id} incarnation {here.incarnation}"
        )
    differing = differing_fields(here.fingerprint, claim.fingerprint)
    if differing:
        raise FingerprintMismatch(
            f"{claim.source_instance} and {here.instance_id} do not serve the same thing: {'; '.join(differing)}"
        )
    if len(claim.offer.encodings) > MAX_OFFERED:
        raise BadFrame(f"open: {len(claim.offer.encodings)} encodings are offered, at most {MAX_OFFERED}")
    if claim.layers_per_group != here.layout.layers_per_group:
        raise BadFrame(f"open: {claim.layers_per_group} layers in a group, not {here.layout.layers_per_group}")


def check_expected(claim: kv.OpenRequest, expected: Expectation, here: Addressee) -> None:
    """Compares what the sender claims with what Redis assigned.

    Raises StaleEpoch or StaleIncarnation when the sender is not (any more) the assigned one, BadFrame when a number or a hash
    is not what it must be.
    """
    request = expected.request
    if claim.epoch != request.epoch:
        raise StaleEpoch(f"{claim.request_id}: epoch {claim.epoch} is not {request.epoch}")
    source = (claim.source_instance, claim.source_incarnation)
    if source != (expected.source_instance, expected.source_incarnation):
        raise StaleIncarnation(
            f"{claim.request_id}: comes from {source[0]} incarnation {source[1]}, assigned is "
            f"{expected.source_instance} incarnation {expected.source_incarnation}"
        )
    in_range = expected.num_tokens + expected.is_move <= claim.num_tokens <= expected.most_tokens
    if not in_range or claim.num_blocks != -(-claim.num_tokens // here.layout.block_tokens):
        raise BadFrame(
            f"{claim.request_id}: {claim.num_tokens} tokens in {claim.num_blocks} blocks, "
            f"the request has {expected.num_tokens} to {expected.most_tokens}, {here.layout.block_tokens} in a block"
        )
    if claim.block_hashes != sequence_hashes(here.fingerprint, request):
        raise BadFrame(f"{claim.request_id}: the block hashes are not those of the request's tokens")


def check_end(end: kv.EndFrame, expected: Expectation, here: Addressee, room_tokens: int) -> tuple[int, ...]:
    """The tokens to go on with; `room_tokens` rows were reserved.

    Raises BadFrame when counts, indexes or ids are out of place.
    """
    if end.first_output_index != len(expected.request.output):
        raise BadFrame(f"end: goes on at output {end.first_output_index}, not {len(expected.request.output)}")
    _check_counts(end, expected, room_tokens)
    tokens = tuple(unpack_tokens(end.next_token_ids))
    if max(tokens, default=0) >= here.vocab_size:
        raise BadFrame(f"end: token id {max(tokens)} is outside the vocabulary of {here.vocab_size}")
    if end.next_logprobs and len(end.next_logprobs) != len(tokens):
        raise BadFrame(f"end: logprobs of {len(end.next_logprobs)} tokens, {len(tokens)} come along")
    for packed in end.next_logprobs:
        if expected.is_move and not packed:
            continue  # of a token that its client has
        try:
            _, ids, _ = unpack_logprobs(packed)
        except ValueError as error:
            raise BadFrame(f"end: {error}") from error
        if max(ids, default=0) >= here.vocab_size:
            raise BadFrame(f"end: logprobs of token id {max(ids)} outside the vocabulary of {here.vocab_size}")
    return tokens


def _check_counts(end: kv.EndFrame, expected: Expectation, room_tokens: int) -> None:
    """Rows and tokens fit each other: the token behind the last row comes along, or is known already."""
    count, odd = divmod(len(end.next_token_ids), 4)
    if expected.is_move:
        if odd or count != end.num_tokens + 1 - expected.num_tokens:
            raise BadFrame(f"end: {len(end.next_token_ids)} bytes of next tokens behind {end.num_tokens} rows")
        if end.num_tokens > room_tokens:
            raise BadFrame(f"end: {end.num_tokens} rows, room was made for {room_tokens}")
        return
    if end.num_tokens != expected.num_tokens:
        raise BadFrame(f"end: {end.num_tokens} tokens, opened with {expected.num_tokens}")
    if odd or not 1 <= count <= MAX_NEXT_TOKENS:
        raise BadFrame(f"end: {len(end.next_token_ids)} bytes of next tokens")
