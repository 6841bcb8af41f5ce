"""Header blocks: HPACK by the hpack library, gathered from HEADERS and CONTINUATION frames, bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import hpack

from workers.kv_wire.h2_frames import END_HEADERS, PADDED, PRIORITY, Code, FrameHead, Kind, WireFault, frame

MOST_LIST_BYTES = 8 * 1024  # of one header list, unpacked
_MOST_BLOCK_BYTES = 8 * 1024
_MOST_FRAMES = 8  # of one block

Headers = dict[str, str]


@dataclass(slots=True)
class HeaderReader:
    """Frames in, whole header lists out."""

    _decoder: hpack.Decoder = field(default_factory=lambda: hpack.Decoder(max_header_list_size=MOST_LIST_BYTES))
    _first: FrameHead | None = None
    _block: bytearray = field(default_factory=bytearray)
    _frames: int = 0

    @property
    def is_open(self) -> bool:
        """True in the middle of a block, in which no other frame may come."""
        return self._first is not None

    def take(self, head: FrameHead, payload: memoryview) -> tuple[FrameHead, Headers] | None:
        """The list and the frame that began it, when this frame is its last one. Of a name that comes twice the first counts.

        Raises WireFault for what cannot be decoded, and beyond the limits.
        """
        if head.kind == Kind.HEADERS:
            self._first, payload = head, _without_padding(head, payload)
        elif self._first is None or self._first.stream != head.stream:
            raise WireFault(Code.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._frames += 1
        self._block += payload
        if len(self._block) > _MOST_BLOCK_BYTES or self._frames > _MOST_FRAMES:
            raise WireFault(Code.ENHANCE_YOUR_CALM, f"headers beyond {_MOST_BLOCK_BYTES} bytes or {_MOST_FRAMES} frames")
        if not head.flags & END_HEADERS:
            return None
        first, block = self._first, bytes(self._block)
        assert first is not None
        self._first, self._frames = None, 0
        self._block.clear()
        return first, self._decode(block)

    def _decode(self, block: bytes) -> Headers:
        try:
            pairs = self._decoder.decode(block, raw=True)
        except hpack.OversizedHeaderListError as error:
            raise WireFault(Code.ENHANCE_YOUR_CALM, f"a header list of more than {MOST_LIST_BYTES} bytes") from error
        except hpack.HPACKError as error:
            raise WireFault(Code.COMPRESSION_ERROR, "headers that cannot be decoded") from error
        found: Headers = {}
        for name, value in pairs:
            found.setdefault(bytes(name).decode("latin-1"), bytes(value).decode("latin-1"))
        return found


class HeaderWriter:
    """Header lists as frames. No list refers to an earlier one, so they may go out in any order."""

    def __init__(self) -> None:
        self._encoder = hpack.Encoder()
        self._encoder.header_table_size = 0

    def frame(self, stream: int, headers: Sequence[tuple[str, str]], flags: int = 0) -> bytes:
        """A HEADERS frame; ours are short enough for one."""
        return frame(Kind.HEADERS, self._encoder.encode(headers), flags | END_HEADERS, stream)


def _without_padding(head: FrameHead, payload: memoryview) -> memoryview:
    skip = pad = 0
    if head.flags & PADDED:
        if not payload:
            raise WireFault(Code.FRAME_SIZE_ERROR, "padded HEADERS without a length of the padding")
        skip, pad = 1, payload[0]
    if head.flags & PRIORITY:
        skip += 5
    if skip + pad > len(payload):
        raise WireFault(Code.PROTOCOL_ERROR, f"HEADERS: {skip + pad} bytes of padding and priority in {len(payload)}")
    return payload[skip : len(payload) - pad]
