"""How far loading is, in bytes of the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from workers.engines.torch.stored_tensors import Piece

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class LoadProgress:
    """Calls progress("weights", bytes done, bytes in all). A tensor counts once, and whole also when a rank keeps a part."""

    def __init__(self, places: Mapping[str, Sequence[Piece]], progress: Progress) -> None:
        self._bytes = {name: sum(piece.stored_bytes for piece in pieces) for name, pieces in places.items()}
        self._total = sum(self._bytes.values())
        self._finished = 0
        self._begun = 0
        self._shown = -1
        self._progress = progress

    def advance(self, stored_bytes: int) -> None:
        """So much of the tensor that is being read has been read."""
        self._begun += stored_bytes
        self._show(min(self._finished + self._begun, self._total))

    def done(self, *names: str) -> None:
        """These tensors have been read."""
        self._finished += sum(self._bytes.pop(name, 0) for name in names)
        self._begun = 0
        self._show(self._finished)

    def _show(self, done_bytes: int) -> None:
        if done_bytes > self._shown:
            self._shown = done_bytes
            self._progress("weights", done_bytes, self._total)
