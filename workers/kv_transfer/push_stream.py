"""One Push call as its sender sees it: frames out under credit, the outcome in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from protos.contract.errors import AutanError, BadFrame, HandoffTimeout, PeerUnavailable
from protos.rpc import error_of
from protos.wire import kv, wire_to_error

_TURN_BYTES = 4 * 1024 * 1024  # handed to the kernel in one turn of the event loop: about two milliseconds


def stream_error(error: grpc.RpcError) -> AutanError:
    """The error behind a broken call; what the tree does not name counts as an unreachable peer."""
    found = error_of(error)
    return PeerUnavailable(found.message) if found.reason == "INTERNAL_ERROR" else found


class PushStream:
    """Sends frames, never more bytes than the receiver granted, and never waits longer than `timeout_s` for anything.

    Every method raises the receiver's refusal as soon as it is known, PeerUnavailable when the stream breaks and
    HandoffTimeout when the receiver grants, reads or answers nothing in time. `news` is called when something arrives. `call`
    is of grpcio, or does the same: `write`, iteration over the replies, `cancel`, and errors that are those of grpcio. It may
    have a `write_now` besides, which begins at once and gives what finishes it, if anything is left to do.
    """

    def __init__(self, call: Any, credit_bytes: int, timeout_s: float, news: Callable[[], object]) -> None:
        self._call = call
        self._write_now = getattr(call, "write_now", None)
        self._credit = credit_bytes
        self._timeout_s = timeout_s
        self._since_turn_bytes = 0
        self._wake = asyncio.Event()
        self._news = news
        self._commit: kv.Commit | None = None
        self._error: AutanError | None = None
        self._writing: asyncio.Task[None] | None = None
        self._reader = asyncio.create_task(self._read())

    @property
    def over(self) -> bool:
        """True when the receiver has ended the stream, one way or the other."""
        return self._commit is not None or self._error is not None

    def check(self) -> None:
        """Raises what ended the stream, if anything did."""
        if self._error is not None:
            raise self._error
        if self._commit is not None:
            raise BadFrame("the receiver committed before the end of the transfer")

    async def send(self, message: Sequence[bytes | memoryview], cost_bytes: int = 0) -> None:
        """Begins to write the pieces of one message when `cost_bytes` of credit are there and the message before it is written.

        So the caller makes the next one while the transport takes this one. What goes wrong with it is raised by the next call.
        """
        if self._credit < cost_bytes:
            await self._wait(lambda: self._credit >= cost_bytes, "credit")
        self.check()
        await self._written()
        self._credit -= cost_bytes
        left = self._call.write(message) if self._write_now is None else self._write_now(message)
        self._since_turn_bytes += cost_bytes
        if left is not None:
            self._writing = asyncio.create_task(_await(left))
        elif self._since_turn_bytes < _TURN_BYTES:
            return
        self._since_turn_bytes = 0
        await asyncio.sleep(0)  # the transport has the message before the caller goes on computing

    async def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                await writing
        except TimeoutError as error:
            raise HandoffTimeout(f"the receiver took no frame for {self._timeout_s} s") from error
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            await self._wait(lambda: self.over, "the reason of a broken stream")
            self.check()
            raise PeerUnavailable("the stream broke") from error

    async def commit(self) -> kv.Commit:
        """Waits for the receiver's commit after the end frame."""
        await self._written()
        await self._wait(lambda: self.over, "the commit")
        if self._error is not None:
            raise self._error
        assert self._commit is not None
        return self._commit

    async def until_over(self) -> None:
        """Waits for the receiver to end the stream, without a bound. Raises its refusal; a commit is no error here."""
        await self._written()
        while not self.over:
            self._wake.clear()
            await self._wake.wait()
        if self._error is not None:
            raise self._error

    def cut(self) -> None:
        """Ends the call, whatever its stage. Idempotent."""
        self._call.cancel()

    async def close(self) -> None:
        """Ends the call, and waits until nothing of it runs here any more. Idempotent."""
        self.cut()
        tasks = [task for task in (self._reader, self._writing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait(self, ready: Any, what: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                while not ready() and not self.over:
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError as error:
            raise HandoffTimeout(f"the receiver gave no answer for {self._timeout_s} s: waited for {what}") from error

    async def _read(self) -> None:
        error: AutanError = PeerUnavailable("the receiver ended the stream without an outcome")
        try:
            async for reply in self._call:
                self._take(reply)
                if self.over:
                    return
        except grpc.RpcError as broken:
            error = stream_error(broken)
        except asyncio.CancelledError:
            error = PeerUnavailable("the stream was cancelled")
        finally:
            if not self.over:
                self._error = error
            self._notify()

    def _take(self, reply: kv.PushReply) -> None:
        self._credit += reply.credit_bytes
        outcome = reply.WhichOneof("outcome")
        if outcome == "commit":
            self._commit = reply.commit
        elif outcome == "refused":
            self._error = wire_to_error(reply.refused)
        self._notify()

    def _notify(self) -> None:
        self._wake.set()
        self._news()


async def _await(left: Awaitable[None]) -> None:
    await left
