"""How often each token occurs in one sequence: what penalties are made of."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence


class TokenCounts:
    """Counts of a growing list of tokens, of which the first `num_prompt` are the prompt.

    `ids[i]` is the i-th token that occurred, each once, and `outputs[i]` how often it is in the output (0: only in the
    prompt). `prompt_and_output(tokens)` is the slow twin. Everything follows from the tokens: a sequence that comes from
    another worker, or is computed again, has the counts that it had before.
    """

    __slots__ = ("_counted", "_num_prompt", "_places", "ids", "outputs")

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        self._counted = 0
        self._places: dict[int, int] = {}
        self.ids = array("q")
        self.outputs = array("q")

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Counts the tokens that were added at the end since the last call."""
        places, ids, outputs = self._places, self.ids, self.outputs
        for index in range(self._counted, len(tokens)):
            token_id = tokens[index]
            place = places.get(token_id)
            if place is None:
                place = places[token_id] = len(ids)
                ids.append(token_id)
                outputs.append(0)
            if index >= self._num_prompt:
                outputs[place] += 1
        self._counted = len(tokens)


def prompt_and_output(tokens: Sequence[int], num_prompt: int) -> dict[int, int]:
    """Every token of the sequence with how often it is in the output."""
    output = Counter(tokens[num_prompt:])
    return {token_id: output[token_id] for token_id in set(tokens)}
