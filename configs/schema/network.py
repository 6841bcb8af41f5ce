"""Where sockets listen and who may call."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from configs.address import parse_address
from configs.schema.base import Line, Section

Bytes = Annotated[int, Field(ge=1024, le=1 << 30)]


def _checked(address: str) -> str:
    parse_address(address)
    return address


Listen = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_checked)]


class NetworkConfig(Section):
    """Sockets between the processes of the cluster.

    `loopback` binds 127.0.0.1. `node` binds the address that Ray gives the node; an address outside 127.0.0.0/8 is
    refused without `insecure: true` until TLS exists. `advertise_host` is where workers on other nodes reach the
    orchestrator; by default the address of its own Ray node.

    A hand-off pushes KV in messages of up to `frame_bytes`, over one connection for each full `stream_bytes` of the sequence
    and at most `streams` of them; the receiver grants no more than its own `streams`. All of them share the credit of the
    hand-off.

    `kv_compression` is how KV blocks travel between workers. `lossless` changes nothing but bytes and CPU time; it pays on
    links that are slower than the packing. `fp8` halves bf16 and fp16, quarters fp32, and changes tokens.
    """

    bind: Literal["loopback", "node"] = "loopback"
    advertise_host: Annotated[str, Field(pattern=r"^[A-Za-z0-9.:\[\]-]{1,253}$")] | None = None
    insecure: bool = False
    max_message_bytes: Bytes = 8 * 1024 * 1024
    frame_bytes: Bytes = 1024 * 1024
    credit_bytes: Bytes = 32 * 1024 * 1024
    streams: Annotated[int, Field(ge=1, le=16)] = 4
    stream_bytes: Bytes = 16 * 1024 * 1024
    keepalive_s: Annotated[float, Field(gt=0, le=3600)] = 1.0
    kv_compression: Literal["none", "lossless", "fp8"] = "none"
    ping_timeout_s: Annotated[float, Field(gt=0, le=3600)] = 2.0


class IngressConfig(Section):
    """The front door: `host:port` (port 0 takes a free one) or `unix:///path`."""

    address: Listen = "127.0.0.1:50600"
    keys_file: Line | None = None
    max_streams: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    max_buffered_tokens: Annotated[int, Field(ge=16, le=10_000_000)] = 4096
    default_max_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 256
    tick_ms: Annotated[float, Field(gt=0, le=1000)] = 2.0
