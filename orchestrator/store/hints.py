"""Pub/sub hints. They only shorten the wait until the next poll; nothing depends on their arrival."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError, RedisError

from orchestrator.store.connection import open_redis
from protos.cancellation import cancellable

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 1.0
SILENCE_S = 2.0


async def subscribe(url: str, channel: str, timeout_s: float) -> AsyncIterator[bytes]:
    """Payloads of one channel over an own connection, until the iterator is closed.

    Yields b"" after each connection. A connection that is silent for 2 s is pinged and given up 2 s later;
    reconnects back off with jitter from 50 ms to 1 s.
    """
    backoff_s = FIRST_BACKOFF_S
    while True:
        redis = open_redis(url, timeout_s, max_connections=2)
        pubsub = redis.pubsub()
        try:
            await cancellable(pubsub.subscribe(channel))
            yield b""
            async for payload in _payloads(pubsub):
                backoff_s = FIRST_BACKOFF_S
                yield payload
        except (RedisError, OSError):
            pass  # lost or refused: connect again
        finally:
            await _close(pubsub, redis)
        await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
        backoff_s = min(LAST_BACKOFF_S, backoff_s * 2)


async def _payloads(pubsub: PubSub) -> AsyncIterator[bytes]:
    pinged = False
    while True:
        message = await cancellable(pubsub.get_message(timeout=SILENCE_S))
        if message is not None:
            pinged = False
            if message["type"] == "message":
                yield message["data"]
        elif pinged:
            raise ConnectionError("no answer to a ping on the hint channel")
        else:
            await cancellable(pubsub.ping())
            pinged = True


async def _close(pubsub: PubSub, redis: Redis) -> None:
    try:
        await pubsub.aclose()  # type: ignore[no-untyped-call]
        await redis.aclose()
        await redis.connection_pool.disconnect()
    except (RedisError, OSError):
        pass  # the connection is gone already
