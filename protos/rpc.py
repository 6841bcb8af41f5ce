"""gRPC as Autan uses it: channel and server options, guarded handlers, errors as statuses.

Measured reasons for the options are in reliability notes: keepalive alone needs 60 s to see a frozen peer, so the ping
timeout is set as well; messages are bounded on both sides; an idle connection may be pinged.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos.contract.errors import AutanError, AuthError, InternalError, InvalidRequest, PeerUnavailable, error_from
from protos.contract.identity import PeerGate
from protos.gen.autan.v1 import admin_pb2_grpc, inference_pb2_grpc, kv_pb2_grpc, tokens_pb2_grpc, worker_pb2_grpc

if TYPE_CHECKING:
    from protos.tls import Trust

__all__ = [
    "DEFAULT_MESSAGE_BYTES",
    "Dialer",
    "GuardInterceptor",
    "admin_pb2_grpc",
    "channel_options",
    "error_of",
    "inference_pb2_grpc",
    "kv_pb2_grpc",
    "open_channel",
    "parsed",
    "server_options",
    "status_of",
    "tokens_pb2_grpc",
    "told_error",
    "worker_pb2_grpc",
]

logger = logging.getLogger(__name__)

DEFAULT_MESSAGE_BYTES = 8 * 1024 * 1024
_DOMAIN = "autan"
_HANDSHAKE_MEANINGS = {
    "Hostname Verification Check failed": "the server's certificate is of another role, cluster or host",
    "unable to get local issuer certificate": "the server's certificate comes from another CA",
    "BAD_SIGNATURE": "the server's certificate comes from another CA",
    "certificate has expired": "the server's certificate has expired, or a clock is wrong",
    "WRONG_VERSION_NUMBER": "the server has no TLS there",
}
_MAX_STATUS_TEXT_BYTES = 1500  # travels twice, percent-encoded and in base64, and a client refuses 16 KiB of metadata


def _liveness(keepalive_s: float, ping_timeout_s: float) -> list[tuple[str, int]]:
    return [
        ("grpc.keepalive_time_ms", int(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(ping_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", int(ping_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def channel_options(
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES, keepalive_s: float = 1.0, ping_timeout_s: float = 2.0
) -> list[tuple[str, Any]]:
    """Client side: bounded messages, a frozen or vanished peer noticed within keepalive + ping timeout."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.use_local_subchannel_pool", 1),
        *_liveness(keepalive_s, ping_timeout_s),
    ]


def server_options(
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES, keepalive_s: float = 1.0, ping_timeout_s: float = 2.0
) -> list[tuple[str, Any]]:
    """Server side of the same; two servers never share a port by accident."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", max(100, int(keepalive_s * 500))),
        ("grpc.http2.max_ping_strikes", 0),
        *_liveness(keepalive_s, ping_timeout_s),
    ]


def open_channel(
    address: str, options: Sequence[tuple[str, Any]] | None = None, trust: Trust | None = None
) -> grpc.aio.Channel:
    """A channel with TLS as `trust` has it; without it, and to every unix socket, a plain one."""
    chosen = list(options or channel_options())
    if trust is None or address.startswith("unix:"):
        return grpc.aio.insecure_channel(address, options=chosen)
    return grpc.aio.secure_channel(address, trust.channel_credentials(), options=[*chosen, *trust.channel_options()])


@dataclass(frozen=True, slots=True)
class Dialer:
    """Opens the channels to the servers of one kind."""

    options: Sequence[tuple[str, Any]] = field(default_factory=channel_options)
    trust: Trust | None = None

    def open(self, address: str) -> grpc.aio.Channel:
        """A channel to one of them; close it."""
        return open_channel(address, self.options, self.trust)

    @property
    def generation(self) -> int:
        """Another one: channels that were opened before show certificates that have been replaced."""
        return 0 if self.trust is None else self.trust.generation


def status_of(error: AutanError) -> status_pb2.Status:
    """An error of the tree as google.rpc.Status with ErrorInfo, and RetryInfo where waiting helps. Long texts are cut."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=_DOMAIN, metadata={"retryable": "true" if error.retryable else "false"}
    )
    details = [_packed(info)]
    if error.retry_after_s > 0:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    code: int = code_pb2.Code.Value(error.code)
    return status_pb2.Status(code=code, message=_clipped(error.message), details=details)


def error_of(rpc_error: grpc.RpcError) -> AutanError:
    """The error of the tree behind a failed call; transport failures become PeerUnavailable."""
    status = rpc_status.from_call(rpc_error)
    if status is not None:
        reason, retry_after_s = "", 0.0
        for detail in status.details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                reason = info.reason
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        if reason:
            return error_from(reason, status.message, retry_after_s)
    code = rpc_error.code() if hasattr(rpc_error, "code") else grpc.StatusCode.UNKNOWN
    text = f"{code.name}: {rpc_error.details() if hasattr(rpc_error, 'details') else rpc_error}"
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return PeerUnavailable(text + _hint(text))
    return InternalError(text)


def _hint(text: str) -> str:
    """What a refused handshake means, in the words of its operators."""
    return next((f" ({meaning})" for mark, meaning in _HANDSHAKE_MEANINGS.items() if mark in text), "")


def _clipped(text: str) -> str:
    raw = text.encode("utf-8", "replace")
    if len(raw) <= _MAX_STATUS_TEXT_BYTES:
        return raw.decode()
    return raw[: _MAX_STATUS_TEXT_BYTES - 4].decode("utf-8", "ignore") + " ..."


def _packed(message: Message) -> any_pb2.Any:
    box = any_pb2.Any()
    box.Pack(message)
    return box


def told_error(error: BaseException, method: str) -> AutanError:
    """What the caller of a method hears of an error: one of the tree as it is, of any other an id that the log explains."""
    if isinstance(error, AutanError):
        return error
    token = secrets.token_hex(6)
    logger.exception("unexpected error %s in %s", token, method, exc_info=error)
    return InternalError(f"internal error {token}: the server's log explains it")


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException, method: str) -> None:
    await context.abort_with_status(rpc_status.to_status(status_of(told_error(error, method))))


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server.

    Garbage bytes are INVALID_ARGUMENT with a generic sentence; errors of the tree become their status; anything else is
    INTERNAL with an opaque id, and the log has the traceback. `gate` looks at the peer's certificate, `authorise(method,
    metadata)` at the call, both before any byte is parsed; they raise AuthError to refuse, and what they return is dropped.
    """

    def __init__(self, authorise: Callable[[str, dict[str, str]], object] | None = None, gate: PeerGate | None = None) -> None:
        self._authorise = authorise
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Replaces the handler's parsing and error mapping; unknown methods pass through (UNIMPLEMENTED)."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method: str = handler_call_details.method
        return _guarded(handler, method, self._check(method, handler_call_details))

    def _check(self, method: str, details: grpc.HandlerCallDetails) -> Callable[[Any], None]:
        authorise, gate = self._authorise, self._gate

        def check(context: Any) -> None:
            if gate is not None:
                try:
                    gate.admit(method, context.peer(), context.auth_context())
                except AuthError as error:
                    logger.warning("a call from %s is refused: %s", context.peer(), error)
                    raise
            if authorise is not None:
                metadata = {str(k): v for k, v in (details.invocation_metadata or ()) if isinstance(v, str)}
                authorise(method, metadata)

        return check


def _parse(deserialize: Callable[[Any], Any], data: Any, method: str) -> Any:
    try:
        return deserialize(data)
    except (DecodeError, RecursionError, ValueError) as error:
        raise InvalidRequest(f"{method}: the request is no valid protobuf message") from error


async def parsed(stream: AsyncIterator[Any], deserialize: Callable[[Any], Any], method: str) -> AsyncIterator[Any]:
    """The messages of a stream. Raises InvalidRequest, with a generic sentence, for garbage."""
    async for data in stream:
        yield _parse(deserialize, data, method)


def _guarded(handler: Any, method: str, check: Callable[[Any], None]) -> grpc.RpcMethodHandler[Any, Any]:
    deserialize = handler.request_deserializer or (lambda data: data)

    def incoming(request: Any) -> Any:
        if handler.request_streaming:
            return parsed(request, deserialize, method)
        return _parse(deserialize, request, method)

    async def unary(request: Any, context: Any) -> Any:
        try:
            check(context)
            behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
            return await behaviour(incoming(request), context)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as error:
            return await _abort(context, error, method)

    async def streaming(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            check(context)
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
            replies = behaviour(incoming(request), context)
            if inspect.isawaitable(replies):  # a handler that writes to the context, with a deadline for each write
                await replies
                return
            async for reply in replies:
                yield reply
        except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
            raise
        except Exception as error:
            await _abort(context, error, method)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    behaviour = streaming if handler.response_streaming else unary
    return make(behaviour, request_deserializer=None, response_serializer=handler.response_serializer)
