"""What an engine that is spread over the ranks of an instance offers the service that starts them.

Rank 0 has the Engine and a `GroupDoor`; each rank above it has an `EngineShare`. Every rank loads before any of them
connects, so that no deadline of a connection covers the loading of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlace:
    """Which rank this is. `host` is where it may listen.

    A rank that is silent for `step_timeout_s` in a step, or for `link_timeout_s` when KV bytes are asked of it, is lost.
    """

    rank: int = 0
    ranks: int = 1
    host: str = "127.0.0.1"
    step_timeout_s: float = 10.0
    link_timeout_s: float = 3.0


class GroupDoor(Protocol):
    """Rank 0's side: where the others connect."""

    @property
    def address(self) -> str:
        """`host:port`; listening from the start."""
        ...

    @property
    def token(self) -> bytes:
        """What a rank must show; drawn anew by every process."""
        ...

    def connect(self) -> None:
        """Waits until every rank is connected, once; may be called again. Raises EngineFailure at the deadline."""
        ...


class EngineShare(Protocol):
    """A rank above 0 that has loaded its share of the weights."""

    def connect(self, address: str, token: bytes) -> None:
        """Connects to rank 0. Raises EngineFailure."""
        ...

    def serve(self) -> None:
        """Computes what rank 0 asks for, until rank 0 ends the group. Raises EngineFailure when a rank is lost."""
        ...

    def close(self) -> None:
        """Frees the device and cuts the connections; from any thread. Idempotent."""
        ...
