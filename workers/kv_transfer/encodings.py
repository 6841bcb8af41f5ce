"""How the bytes of a layer group travel: as they are, or packed. One transfer has one encoding, and its receiver chooses it.

| encoding | what arrives | digest over | prefix cache of the receiver |
|---|---|---|---|
| NONE | the same bytes | the bytes | as if computed there |
| LOSSLESS | the same bytes (byte_planes) | the bytes before packing and after unpacking | as if computed there |
| FP8 | nearly the same numbers (fp8_rows) | the packed bytes, and the encoding | never: see Engine.import_commit |

The sender names what it can do, with LOSSLESS always and FP8 only where its own configuration says so: what changes tokens
needs the word of both sides.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from typing import Literal, Protocol

from protos.contract.errors import BadFrame
from protos.wire import kv
from workers.engine_api.types import KvLayout
from workers.kv_transfer.byte_planes import BytePlanes
from workers.kv_transfer.fp8_rows import Fp8Rows

Compression = Literal["none", "lossless", "fp8"]  # network.kv_compression
_VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MAX_OFFERED = 16


class Encoding(Enum):
    """The values are those of `KvEncoding` in kv.proto."""

    NONE = kv.KV_ENCODING_NONE
    LOSSLESS = kv.KV_ENCODING_LOSSLESS
    FP8 = kv.KV_ENCODING_FP8

    @property
    def is_exact(self) -> bool:
        """True when the receiver has the sender's bytes afterwards."""
        return self is not Encoding.FP8


class Codec(Protocol):
    """Packs whole layer groups. Any thread may call it at any time."""

    def most_bytes(self, raw_bytes: int) -> int:
        """The longest packed form of a layer group of so many bytes."""
        ...

    def pack(self, raw: memoryview) -> bytes:
        """The packed form of a layer group."""
        ...

    def unpack(self, packed: memoryview, raw_bytes: int) -> memoryview:
        """The layer group of `raw_bytes`. Raises ValueError for bytes that no layer group is packed into; takes no more
        memory than `raw_bytes` a few times, whatever the bytes claim."""
        ...


def codec_of(encoding: Encoding, layout: KvLayout) -> Codec | None:
    """The codec of an encoding for KV of this layout; none where bytes travel as they are."""
    match encoding:
        case Encoding.NONE:
            return None
        case Encoding.LOSSLESS:
            return BytePlanes(_VALUE_BYTES.get(layout.dtype, 1))
        case Encoding.FP8:
            return Fp8Rows(layout.dtype, layout.row_bytes // _VALUE_BYTES[layout.dtype])


def offered(configured: Compression, layout: KvLayout) -> tuple[Encoding, ...]:
    """What a sender offers."""
    if configured == "fp8" and layout.dtype in _VALUE_BYTES:
        return (Encoding.LOSSLESS, Encoding.FP8)
    return (Encoding.LOSSLESS,)


def chosen(configured: Compression, can: Collection[int], layout: KvLayout) -> Encoding:
    """What a receiver chooses of what the sender can: what it is configured for, or NONE."""
    wanted = {"none": Encoding.NONE, "lossless": Encoding.LOSSLESS, "fp8": Encoding.FP8}[configured]
    if wanted is Encoding.FP8 and layout.dtype not in _VALUE_BYTES:
        return Encoding.NONE
    return wanted if wanted.value in can else Encoding.NONE


def agreed(reply: int, offers: Collection[Encoding]) -> Encoding:
    """The receiver's choice as the sender reads it. Raises BadFrame for what was not offered."""
    for encoding in (Encoding.NONE, *offers):
        if encoding.value == reply:
            return encoding
    raise BadFrame(f"the receiver chose the encoding {reply}, which was not offered")
