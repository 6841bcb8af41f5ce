"""What the batcher needs of a grammar. Decides nothing about grammars itself: that is workers/grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from protos.contract.errors import AutanError, InvalidRequest
from workers.batching.runner import AllowedTokens
from workers.engine_api.types import EngineRequest, SamplingParams


class Constraint(Protocol):
    """The grammar of one sequence. Its state follows from the grammar and the output tokens alone.

    So nothing of it travels with a hand-off: whoever continues a sequence opens it anew and shows it all tokens.
    """

    @property
    def fault(self) -> AutanError | None:
        """Why the sequence cannot go on; None while it can."""
        ...

    def follow(self, tokens: Sequence[int]) -> AllowedTokens:
        """Begins to compute elsewhere what may come after `tokens` (prompt and output), and returns how to wait for it.

        Never blocks. The tokens begin with those of the call before; for the same tokens nothing is computed again.
        """
        ...


class Constrainer(Protocol):
    """Makes constraints for one vocabulary. Used from the engine's thread."""

    def open(self, sampling: SamplingParams, num_prompt: int) -> Constraint:
        """The constraint of a new sequence; what is wrong with its grammar shows when it is followed. Never blocks.

        Raises InvalidRequest when the sequence could never end.
        """
        ...

    def close(self) -> None:
        """Stops computing. Idempotent."""
        ...


def open_constraint(constrainer: Constrainer | None, request: EngineRequest) -> Constraint | None:
    """The constraint that a request asks for, if any. Raises InvalidRequest when there can be none."""
    if request.sampling.grammar is None:
        return None
    if constrainer is None:
        raise InvalidRequest(f"{request.request_id}: grammar: this engine does not know its tokens as text; leave it out")
    return constrainer.open(request.sampling, len(request.prompt))
