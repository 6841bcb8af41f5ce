"""The frames of HTTP/2 (RFC 9113) as bytes, and what of them is accepted here."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
LARGEST_WINDOW_BYTES = 2**31 - 1
LARGEST_FRAME_BYTES = 2**24 - 1
FIRST_WINDOW_BYTES = 65_535  # before any SETTINGS or WINDOW_UPDATE
SMALLEST_FRAME_BYTES = 16_384  # what everybody takes
MOST_CONTROL_BYTES = 16_384  # of a frame that is not DATA
MOST_SETTINGS = 32  # in one frame

END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20

_HEAD = struct.Struct(">HBBBL")
_SETTING = struct.Struct(">HL")


class Kind(IntEnum):
    """Frame types. Others exist and are passed over."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Code(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class Setting(IntEnum):
    """Settings that mean something here."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class WireFault(Exception):
    """The peer broke the protocol, or a limit of it: the connection ends with `code`."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class FrameHead:
    """The nine bytes in front of each frame."""

    size_bytes: int
    kind: int
    flags: int
    stream: int


def read_head(view: memoryview) -> FrameHead:
    """The head in the first nine bytes."""
    high, low, kind, flags, stream = _HEAD.unpack_from(view)
    return FrameHead(high << 8 | low, kind, flags, stream & 0x7FFF_FFFF)


def head(size_bytes: int, kind: int, flags: int = 0, stream: int = 0) -> bytes:
    """The head of a frame whose payload follows."""
    return _HEAD.pack(size_bytes >> 8, size_bytes & 0xFF, kind, flags, stream)


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    """A whole frame."""
    return head(len(payload), kind, flags, stream) + payload


def settings(values: Mapping[Setting, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(Kind.SETTINGS, b"".join(_SETTING.pack(key, value) for key, value in values.items()))


def greeting(most_list_bytes: int, *, is_client: bool) -> bytes:
    """What each side says first: windows and frames are as large as they can be, one call at a time, nothing is pushed."""
    wanted = {
        Setting.INITIAL_WINDOW_SIZE: LARGEST_WINDOW_BYTES,
        Setting.MAX_FRAME_SIZE: LARGEST_FRAME_BYTES,
        Setting.MAX_HEADER_LIST_SIZE: most_list_bytes,
    }
    wanted |= {Setting.ENABLE_PUSH: 0} if is_client else {Setting.MAX_CONCURRENT_STREAMS: 1}
    widest = window_update(LARGEST_WINDOW_BYTES - FIRST_WINDOW_BYTES)
    return (PREFACE if is_client else b"") + settings(wanted) + widest


def read_settings(payload: memoryview) -> dict[int, int]:
    """What a SETTINGS frame says. Raises WireFault for values that HTTP/2 does not know, and for too many of them."""
    if len(payload) % _SETTING.size:
        raise WireFault(Code.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
    if len(payload) > MOST_SETTINGS * _SETTING.size:
        raise WireFault(Code.ENHANCE_YOUR_CALM, f"more than {MOST_SETTINGS} settings in one frame")
    found: dict[int, int] = dict(_SETTING.iter_unpack(payload))
    if found.get(Setting.INITIAL_WINDOW_SIZE, 0) > LARGEST_WINDOW_BYTES:
        raise WireFault(Code.FLOW_CONTROL_ERROR, "SETTINGS: an initial window beyond 2^31-1")
    if not SMALLEST_FRAME_BYTES <= found.get(Setting.MAX_FRAME_SIZE, SMALLEST_FRAME_BYTES) <= LARGEST_FRAME_BYTES:
        raise WireFault(Code.PROTOCOL_ERROR, "SETTINGS: a largest frame outside of 2^14 to 2^24-1")
    if found.get(Setting.ENABLE_PUSH, 0) > 1:
        raise WireFault(Code.PROTOCOL_ERROR, "SETTINGS: ENABLE_PUSH is 0 or 1")
    return found


def window_update(size_bytes: int, stream: int = 0) -> bytes:
    """The peer may send so much more."""
    return frame(Kind.WINDOW_UPDATE, size_bytes.to_bytes(4, "big"), stream=stream)


def reset(stream: int, code: Code) -> bytes:
    """The stream ends here."""
    return frame(Kind.RST_STREAM, code.to_bytes(4, "big"), stream=stream)


def goaway(last_stream: int, fault: WireFault) -> bytes:
    """The connection ends here."""
    text = str(fault).encode()[:200]
    return frame(Kind.GOAWAY, last_stream.to_bytes(4, "big") + fault.code.to_bytes(4, "big") + text)


def read_number(view: memoryview, at: int = 0) -> int:
    """The 32 bits at that place."""
    return int.from_bytes(view[at : at + 4], "big")
