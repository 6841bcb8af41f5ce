"""Calls to Redis whose cancellation cannot get lost, for both sides."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def cancellable(work: Awaitable[T]) -> T:
    """Awaits `work`; CancelledError when the task was cancelled meanwhile, even if `work` returned or failed all the same.

    redis-py does that on Python 3.11: its `asyncio.wait_for` drops a cancellation that meets a finished write. A loop around
    a call that is cancelled once, at its end, would go on for ever.
    """
    task = asyncio.current_task()
    assert task is not None, "runs in a task"
    before = task.cancelling()
    try:
        result = await work
    except Exception as error:
        if task.cancelling() > before:
            raise asyncio.CancelledError from error
        raise
    if task.cancelling() > before:
        raise asyncio.CancelledError
    return result
