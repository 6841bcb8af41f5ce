"""Token ids to text, one token at a time, without splitting a character or repeating a space. Pure.

The promise of every detokenizer: the pieces in order, and what `flush` gives in the end, are together the text of the
whole sequence. A piece is empty while a character is incomplete. Special tokens show nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_WINDOW_TOKENS = 64
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    """The text of one growing sequence."""

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        ...

    def flush(self) -> str:
        """The rest, when no more tokens come; an incomplete character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """For vocabularies whose tokens are byte strings: the bytes go through an incremental UTF-8 decoder.

    Ids that `bytes_of` does not have show nothing.
    """

    def __init__(self, bytes_of: Mapping[int, bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        return self._decoder.decode(self._bytes_of.get(token_id, b""))

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other vocabulary: decodes a small window and shows what it adds to the text of its older half.

    The older half gives the decoder its context, so a space at the start of a word is neither lost nor doubled. The
    promise holds for sequences whose bytes are valid UTF-8; an invalid run longer than the window is shown as it decodes.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], is_special: Callable[[int], bool]) -> None:
        self._decode = decode
        self._is_special = is_special
        self._window: list[int] = []
        self._shown_tokens = 0  # of the window: their text was shown

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        if self._is_special(token_id):
            return ""
        self._window.append(token_id)
        pending = len(self._window) - self._shown_tokens
        return self._advance(force=pending >= _WINDOW_TOKENS)

    def flush(self) -> str:
        """See Detokenizer."""
        return self._advance(force=True)

    def _advance(self, force: bool) -> str:
        shown = self._decode(self._window[: self._shown_tokens])
        text = self._decode(self._window)
        if not force and (len(text) <= len(shown) or text.endswith(_REPLACEMENT)):
            return ""
        self._window = self._window[self._shown_tokens :]
        self._shown_tokens = len(self._window)
        return text[len(shown) :]
