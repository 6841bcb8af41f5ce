"""The computing side of a rank above 0, on a thread of its own: loads, connects when rank 0 says where, serves, ends."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress

from workers.engine_api.group import EngineShare


class ShareThread:
    """Runs what `build` makes; None is a share with nothing to compute. Its methods are called on the event loop.

    `on_end` hears how serving ended: None when rank 0 ended the group in order, else the error. It is not called after `stop`.
    """

    def __init__(self, build: Callable[[], EngineShare | None], on_end: Callable[[BaseException | None], None]) -> None:
        self._build = build
        self._on_end = on_end
        self._doors: queue.SimpleQueue[tuple[str, bytes] | None] = queue.SimpleQueue()
        self._connected = False
        self._stopping = False
        self._share: EngineShare | None = None
        self._loaded = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="autan-share", daemon=True)

    def start(self) -> None:
        """Begins to load."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def loaded(self) -> bool:
        """True when the weights are there."""
        return self._loaded.is_set()

    async def wait_loaded(self, timeout_s: float) -> None:
        """Until the weights are there, at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._loaded.wait()

    def connect(self, address: str, token: bytes) -> None:
        """Lets the thread connect to rank 0. Later calls do nothing."""
        if not self._connected:
            self._connected = True
            self._doors.put((address, token))

    async def stop(self, timeout_s: float) -> None:
        """Cuts the connections and waits for the thread; a collective that hangs is left behind. Idempotent."""
        self._stopping = True
        self._doors.put(None)
        if self._share is not None:
            self._share.close()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, timeout_s)

    # -- on its thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._tell(self._ended, error)
        finally:
            if self._share is not None:
                self._share.close()

    def _serve(self) -> None:
        self._share = self._build()
        self._tell(self._loaded.set)
        if self._share is None:
            return
        door = self._doors.get()
        if door is None:
            return
        self._share.connect(*door)
        self._share.serve()
        self._tell(self._ended, None)

    def _ended(self, error: BaseException | None) -> None:
        if not self._stopping:
            self._on_end(error)

    def _tell(self, fn: Callable[..., None], *args: BaseException | None) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(fn, *args)
