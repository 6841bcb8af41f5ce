"""Stop strings across the borders of tokens. Pure.

The text that may still turn out to be the start of a stop string is held back; everything else passes at once. A stop
string counts where its last character arrives; of several that end there the one that starts first wins. So the result
does not depend on how the text is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """What one piece of text led to: text that may be shown, and the stop string if one is complete."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Looks for stop strings in a text that arrives in pieces. After a match it must not be fed again."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._held = ""

    def push(self, piece: str, armed: bool = True) -> StopMatch:
        """Takes the next piece. With `armed` off a stop string that ends in this piece is ordinary text."""
        if not self._stops:
            return StopMatch(piece)
        text = self._held + piece
        found = self._first_match(text) if armed else None
        if found is not None:
            start, stop = found
            self._held = ""
            return StopMatch(text[:start], stop)
        keep = self._held_back(text)
        self._held = text[len(text) - keep :]
        return StopMatch(text[: len(text) - keep])

    def flush(self) -> str:
        """The text held back, when no more is to come."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            # What is held was looked at before: a match must end in the new piece.
            start = text.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _held_back(self, text: str) -> int:
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
