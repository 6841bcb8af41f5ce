"""The end of a call as gRPC says it: trailers, on both sides."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import quote, unquote

import grpc
import grpc.aio
from google.rpc import status_pb2

from workers.kv_wire.header_blocks import Headers

DETAILS = "grpc-status-details-bin"
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def trailers(code: int, text: str = "", details: status_pb2.Status | None = None) -> list[tuple[str, str]]:
    """The trailers of a call that ends with this status."""
    found = [("grpc-status", str(code))]
    if text:
        found.append(("grpc-message", quote(text, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~")))
    if details is not None:
        found.append((DETAILS, base64.b64encode(details.SerializeToString()).decode().rstrip("=")))
    return found


def failure(code: grpc.StatusCode, text: str, details: bytes | None = None) -> grpc.aio.AioRpcError:
    """What a call of grpcio would raise."""
    trailing = grpc.aio.Metadata() if details is None else grpc.aio.Metadata((DETAILS, details))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=text)


def failure_of(headers: Headers) -> grpc.aio.AioRpcError | None:
    """What trailers say; none when they say that all went well."""
    raw = headers.get("grpc-status", "")
    code = _CODES.get(int(raw), grpc.StatusCode.UNKNOWN) if raw.isascii() and raw.isdigit() else grpc.StatusCode.UNKNOWN
    if code is grpc.StatusCode.OK:
        return None
    text = unquote(headers.get("grpc-message", f"the peer ended the call with HTTP status {headers.get(':status', '')!r}"))
    return failure(code, text, _unpacked(headers.get(DETAILS)))


def _unpacked(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
