"""The text of one generated sequence: detokenizer and stop strings together. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.ingress.detokenizer import Detokenizer
from orchestrator.ingress.stops import StopMatcher


@dataclass(frozen=True, slots=True)
class TextRules:
    """How tokens of one request become text. `detokenizer` makes a fresh one; stops count behind `min_tokens`."""

    detokenizer: Callable[[], Detokenizer]
    stops: Sequence[str] = ()
    min_tokens: int = 0


class TextStream:
    """Text pieces by token. The same tokens give the same pieces, in one process or after a restart in another."""

    def __init__(self, rules: TextRules) -> None:
        self._detokenizer = rules.detokenizer()
        self._matcher = StopMatcher(rules.stops)
        self._min_tokens = rules.min_tokens
        self._pushed = 0

    def push(self, token_id: int) -> tuple[str, str | None]:
        """The text that this token releases, and the stop string that it completes."""
        self._pushed += 1
        match = self._matcher.push(self._detokenizer.push(token_id), armed=self._pushed > self._min_tokens)
        return match.text, match.stop

    def flush(self) -> str:
        """The text held back, when the sequence ended without a stop string.

        A stop string that only the replacement of an incomplete character would complete does not count.
        """
        released = self._matcher.push(self._detokenizer.flush(), armed=False)
        return released.text + self._matcher.flush()
