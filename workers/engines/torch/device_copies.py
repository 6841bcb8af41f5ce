"""Bytes between the pool of a device and the memory of the host, through pinned buffers and beside the computing stream.

On a CPU the same steps run without streams, which is how they are tested. Nothing of this has run on a GPU yet.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SLOTS = 4


class DeviceCopies:
    """Copies up to `most_bytes` at a time. From any thread: copies in are ordered by a lock, copies out need none.

    What computes on the device's default stream after `write` sees the bytes written; `read` sees what was computed before it.
    """

    def __init__(self, device: torch.device, most_bytes: int) -> None:
        self._device = device
        self._most_bytes = most_bytes
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._slots: list[Tensor] = []
        self._busy: list[Any] = []  # the event after which a slot may be filled again
        self._next = 0
        self._lock = threading.Lock()

    def read(self, source: Tensor) -> memoryview:
        """The bytes of a run of uint8 on the device, as a copy that stays valid as long as somebody holds it."""
        # Pinned memory comes from torch's cache of it: a buffer is used again when its last view is gone.
        host = torch.empty(source.shape, dtype=torch.uint8, pin_memory=self._stream is not None)
        if self._stream is None:
            host.copy_(source)
        else:
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            with torch.cuda.stream(self._stream):
                host.copy_(source, non_blocking=True)
                done = self._stream.record_event()
            done.synchronize()
        return host.numpy().data.toreadonly()

    def write(self, target: Tensor, data: memoryview) -> None:
        """Copies into a run of uint8 on the device; `data` may change as soon as this returns."""
        size = data.nbytes
        assert size <= self._most_bytes, (size, self._most_bytes)
        with self._lock:
            slot, number = self._free_slot()
            slot[:size].numpy()[:] = np.frombuffer(data, dtype=np.uint8)
            if self._stream is None:
                target.copy_(slot[:size])
                return
            compute = torch.cuda.default_stream(self._device)
            self._stream.wait_stream(compute)
            with torch.cuda.stream(self._stream):
                target.copy_(slot[:size], non_blocking=True)
                self._busy[number] = self._stream.record_event()
            compute.wait_event(self._busy[number])

    def _free_slot(self) -> tuple[Tensor, int]:
        number, self._next = self._next, (self._next + 1) % _SLOTS
        if number == len(self._slots):
            pinned = self._stream is not None
            self._slots.append(torch.empty(self._most_bytes, dtype=torch.uint8, pin_memory=pinned))
            self._busy.append(None)
        if self._busy[number] is not None:
            self._busy[number].synchronize()
        return self._slots[number], number
