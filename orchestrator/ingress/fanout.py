"""Several completions of one prompt: requests of their own, read as one stream. No effects.

Choice `i` of request `r` is the request `r.i`. Everything that holds for a request holds for it: it is placed, journaled,
handed over and resumed alone, and the prefix cache computes the prompt that all share once where they meet. Choice 0 draws
with the seed of the whole, so it is what n = 1 gives; the seeds of the others follow from that seed and their number. A
request without a seed leaves every choice to draw its own, as the body of a repeated request must not change.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

from orchestrator.ingress.events import accepted_event, finished_event, tokens_event
from orchestrator.ingress.live import LiveStream
from orchestrator.ingress.validate import check_request_id
from protos.contract.errors import AutanError, InvalidRequest
from protos.wire import inference

MAX_CHOICES = 16
_SEED_BYTES = 8
_SEED_MASK = 2**53 - 1  # survives a passage through JSON


def fan_out(request: inference.GenerateRequest) -> list[inference.GenerateRequest]:
    """The requests to submit, one for each choice; the request itself, without its `n`, for a single one.

    Raises InvalidRequest for an `n` that is not between 1 and 16 (0 counts as 1) or an id that leaves no room for a suffix.
    """
    if request.n > MAX_CHOICES:
        raise InvalidRequest(f"n: {request.n} is not between 1 and {MAX_CHOICES}")
    if request.n <= 1:
        return [_copy(request, request.request_id)]
    if request.request_id:
        check_request_id(request.request_id)
        check_request_id(choice_id(request.request_id, MAX_CHOICES - 1))
    common_id = request.request_id or f"r-{secrets.token_hex(12)}"
    choices = [_copy(request, choice_id(common_id, choice)) for choice in range(request.n)]
    if request.sampling.HasField("seed"):
        for choice, one in enumerate(choices):
            one.sampling.seed = choice_seed(request.sampling.seed, choice)
    return choices


def choice_id(request_id: str, choice: int) -> str:
    """The id under which one choice runs."""
    return f"{request_id}.{choice}"


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one choice; that of choice 0 is the seed itself."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}.{choice}".encode(), digest_size=_SEED_BYTES, person=b"autan-choice").digest()
    return int.from_bytes(digest, "little") & _SEED_MASK


class ChoiceReader:
    """Reads the streams of all choices by cursor, from `cursor` on; none of them has to wait for another."""

    def __init__(self, lives: Sequence[LiveStream], cursor: int, max_event_tokens: int) -> None:
        self._open = dict(enumerate(lives))
        self._cursors = [cursor] * len(lives)
        self._max_event_tokens = max_event_tokens

    @property
    def is_over(self) -> bool:
        """True when every choice has told its end."""
        return not self._open

    def accepted(self) -> list[inference.GenerateEvent]:
        """The first event of each choice."""
        return [accepted_event(live, choice) for choice, live in self._open.items()]

    def news(self) -> list[inference.GenerateEvent]:
        """At most one event of each choice. Raises the error with which a choice ended: it is the end of all."""
        events = []
        for choice, live in list(self._open.items()):
            chunk = live.stream.read(self._cursors[choice], self._max_event_tokens)
            outcome = live.stream.outcome
            if chunk is not None:
                self._cursors[choice] += len(chunk.token_ids)
                events.append(tokens_event(chunk, choice))
            elif isinstance(outcome, AutanError):
                raise type(outcome)(outcome.message, outcome.retry_after_s)
            elif outcome is not None:
                del self._open[choice]
                events.append(finished_event(live, outcome, choice))
        return events


def _copy(request: inference.GenerateRequest, request_id: str) -> inference.GenerateRequest:
    one = inference.GenerateRequest()
    one.CopyFrom(request)
    one.ClearField("n")
    one.request_id = request_id
    return one
