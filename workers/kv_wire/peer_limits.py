"""What the peer takes from here, and what is taken from the peer of frames that carry nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.kv_wire.h2_frames import (
    FIRST_WINDOW_BYTES,
    LARGEST_WINDOW_BYTES,
    SMALLEST_FRAME_BYTES,
    Code,
    Setting,
    WireFault,
)

_MOST_IDLE_FRAMES = 256.0  # at once ...
_IDLE_FRAMES_PER_S = 64.0  # ... and for ever


@dataclass(slots=True)
class PeerLimits:
    """Bytes that may be sent: in one frame, on the connection, and on the stream of the call that runs."""

    frame_bytes: int = SMALLEST_FRAME_BYTES
    connection_bytes: int = FIRST_WINDOW_BYTES
    stream_bytes: int = FIRST_WINDOW_BYTES
    _first_stream_bytes: int = FIRST_WINDOW_BYTES

    @property
    def room_bytes(self) -> int:
        """Of the next frame; none when it is not positive."""
        return min(self.frame_bytes, self.connection_bytes, self.stream_bytes)

    def begin_call(self) -> None:
        """The stream is a new one."""
        self.stream_bytes = self._first_stream_bytes

    def spend(self, size: int) -> None:
        """So much was sent."""
        self.connection_bytes -= size
        self.stream_bytes -= size

    def apply(self, found: Mapping[int, int]) -> None:
        """The peer's settings. Raises WireFault when a window overflows."""
        self.frame_bytes = found.get(Setting.MAX_FRAME_SIZE, self.frame_bytes)
        first = found.get(Setting.INITIAL_WINDOW_SIZE, self._first_stream_bytes)
        self.stream_bytes += first - self._first_stream_bytes
        self._first_stream_bytes = first
        self._check()

    def widen(self, size: int, *, is_stream: bool) -> None:
        """The peer takes more. Raises WireFault when a window overflows."""
        if is_stream:
            self.stream_bytes += size
        else:
            self.connection_bytes += size
        self._check()

    def _check(self) -> None:
        if max(self.connection_bytes, self.stream_bytes) > LARGEST_WINDOW_BYTES:
            raise WireFault(Code.FLOW_CONTROL_ERROR, "a window beyond 2^31-1")


@dataclass(slots=True)
class IdleBudget:
    """Frames that carry nothing of a call: a peer may send some at once, a few for ever, and one more with each message."""

    counted_s: float
    left: float = _MOST_IDLE_FRAMES

    def message(self) -> None:
        """One came."""
        self.left = min(_MOST_IDLE_FRAMES, self.left + 1)

    def spend(self, now_s: float) -> None:
        """Such a frame came. Raises WireFault when there were too many."""
        earned = (now_s - self.counted_s) * _IDLE_FRAMES_PER_S
        self.left, self.counted_s = min(_MOST_IDLE_FRAMES, self.left + earned) - 1, now_s
        if self.left < 0:
            raise WireFault(Code.ENHANCE_YOUR_CALM, "too many frames that carry nothing")
