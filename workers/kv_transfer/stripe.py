"""One stream's share of an incoming transfer: its blocks, its credit and who is attached to it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from protos.contract.errors import BadFrame
from workers.kv_transfer.frames import Reassembly
from workers.kv_transfer.packing import GroupUnpacker


@dataclass(slots=True, kw_only=True, eq=False)
class Stripe:
    """`attachment` numbers the streams that were attached one after another: one whose number is not this one has been
    replaced."""

    number: int
    reassembly: Reassembly
    unpacker: GroupUnpacker
    window_bytes: int
    attachment: int = 0
    is_attached: bool = False
    credit: int = 0
    owed: int = 0
    waiting: asyncio.Timeout | None = None

    def attach(self) -> int:
        """A stream is here now; gives its number."""
        self.is_attached = True
        self.attachment += 1
        return self.attachment

    def detach(self, attachment: int) -> None:
        """That stream is gone. Nothing happens when another one has its place already."""
        if self.attachment == attachment:
            self.is_attached = False

    def begin_again(self) -> int:
        """Whoever was attached is replaced, and the block that is not complete comes again. Gives the fresh credit."""
        self.attachment += 1
        self.is_attached = False
        self.reassembly.rewind()
        self.unpacker.rewind()
        self.wake()
        self.credit, self.owed = self.window_bytes, 0
        return self.credit

    def spend(self, payload_bytes: int) -> None:
        """Takes received bytes off the window. Raises BadFrame beyond it."""
        self.credit -= payload_bytes
        self.owed += payload_bytes
        if self.credit < 0:
            raise BadFrame(f"stream {self.number}: {-self.credit} bytes beyond the credit")

    def regrant(self) -> int:
        """Bytes to grant again, in portions of a quarter window; zero when there is no portion yet."""
        if self.owed < self.window_bytes // 4:
            return 0
        granted, self.owed = self.owed, 0
        self.credit += granted
        return granted

    def wake(self) -> None:
        """Makes the attached stream look at the state instead of waiting for its next frame."""
        waiting, self.waiting = self.waiting, None  # a timeout that is expiring cannot be moved again
        if waiting is not None:
            waiting.reschedule(asyncio.get_running_loop().time())
