"""What the lifecycles of requests and instances share: how an illegal move is refused."""

from __future__ import annotations


class IllegalMove(AssertionError):
    """A lifecycle table has no such move. A bug of the caller; nothing changed."""
