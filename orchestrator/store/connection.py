"""Connections to Redis as Autan uses them: no hidden retries, short timeouts, errors of our tree.

redis-py retries a call whose reply was lost, which runs it twice; here a call is sent once, and whoever repeats it knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterError,
    ConnectionError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from protos.contract.errors import AutanError, ConfigError, InternalError, StoreFull, StoreUnavailable

MAX_CONNECTIONS = 32
RETRY_AFTER_S = 0.5

# Errors that pass by themselves or with an operator's help, without a change of ours: by class where redis-py has one
# (it then drops the first word), else by their first word.
_PASSING = (ReadOnlyError, MasterDownError, ClusterError)
_REFUSED = (AuthenticationError, AuthorizationError, NoPermissionError)
_PASSING_WORDS = ("MISCONF", "BUSY", "NOREPLICAS")


def open_redis(url: str, timeout_s: float, max_connections: int = MAX_CONNECTIONS) -> Redis:
    """A client that connects when it is used. Raises ConfigError for an url that is none."""
    try:
        pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            decode_responses=False,
            protocol=2,
        )
    except ValueError as error:
        raise ConfigError(f"store.url: {error}") from error
    return Redis.from_pool(pool)


def is_function_missing(error: BaseException) -> bool:
    """True when the server does not have the library: it was flushed, or never loaded."""
    return isinstance(error, ResponseError) and "Function not found" in str(error)


def translate(error: BaseException, what: str) -> AutanError:
    """The error of our tree for one of redis-py. `what` names the call."""
    text = f"{what}: {str(error) or type(error).__name__}"
    # Refused credentials come wrapped in a ConnectionError when they are refused while connecting.
    if any(isinstance(seen, _REFUSED) for seen in (error, error.__cause__)):
        return ConfigError(f"{text}; check the user and password in store.url")
    if isinstance(error, ConnectionError | TimeoutError | OSError):
        return StoreUnavailable(text, RETRY_AFTER_S)
    if isinstance(error, OutOfMemoryError):
        return StoreFull(text, RETRY_AFTER_S)
    passes = isinstance(error, _PASSING) or (isinstance(error, ResponseError) and str(error).startswith(_PASSING_WORDS))
    if passes or is_function_missing(error):
        return StoreUnavailable(text, RETRY_AFTER_S)
    return InternalError(text)


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Raises StoreUnavailable, StoreFull, ConfigError or InternalError for whatever redis-py or the socket raise inside."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise translate(error, what) from error
