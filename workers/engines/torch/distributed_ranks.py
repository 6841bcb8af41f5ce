"""Ranks over torch.distributed: gloo between CPUs, NCCL between GPUs.

Sums are gathered and added in the order of ranks, in fp32, rounded once: every rank gets the same bits, and a row's bits
do not depend on its place in the batch, which the ring of an all-reduce does not promise. NCCL reduces in the dtype of the
activations unless the model is `deterministic`.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_distributed
from torch import Tensor

from protos.contract.errors import EngineFailure

dist: Any = torch_distributed  # its stubs leave out the stores and the groups


def listening_socket(host: str) -> socket.socket:
    """A free port of this host alone, for the rendezvous store, which by itself listens on every address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), 0), family=family)


class DistributedRanks:
    """Implements Ranks. Known from the start: rank and size; the collectives work once it is connected.

    A collective that waits longer than `timeout_s` raises EngineFailure, as does one with a rank that is gone.
    """

    def __init__(
        self, rank: int, size: int, host: str, device: torch.device, timeout_s: float, *, ordered: bool = True
    ) -> None:
        self.rank = rank
        self.size = size
        self._host = host.strip("[]")
        self._device = device
        self._timeout = timedelta(seconds=timeout_s)
        self._ordered = ordered or device.type == "cpu"
        self._group: Any = None
        self._store: Any = None

    def connect(self, head: str, port: int, listener: socket.socket | None = None) -> None:
        """Meets the other ranks at rank 0's host and port; rank 0 passes its listener there. Raises EngineFailure."""
        try:
            self._store = dist.TCPStore(
                head.strip("[]"),
                port,
                None,
                listener is not None,
                self._timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach() if listener is not None else None,
            )
            self._group = self._make_group(dist.PrefixStore("ranks", self._store))
            self.sum(torch.zeros(1, 1, device=self._device))
        except (RuntimeError, ValueError) as error:
            raise EngineFailure(f"rank {self.rank} of {self.size} cannot meet the others: {_first_line(error)}") from error

    def sum(self, x: Tensor) -> Tensor:
        """See Ranks.sum."""
        if not self._ordered:
            self._wait(lambda group: group.allreduce([x]))
            return x
        parts = self._gather(x)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def join_columns(self, x: Tensor) -> Tensor:
        """See Ranks.join_columns."""
        if not x.shape[0]:
            return x.new_empty(0, self.size * x.shape[1])
        return self._gather(x).transpose(0, 1).reshape(x.shape[0], -1)

    def close(self) -> None:
        """Leaves the others. Idempotent."""
        self._group = self._store = None

    def _gather(self, x: Tensor) -> Tensor:
        """All ranks' `[T, C]`, [size, T, C]."""
        x = x.contiguous()
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        self._wait(lambda group: group._allgather_base(out, x))
        return out.view(self.size, *x.shape)

    def _wait(self, start: Any) -> None:
        if self._group is None:
            raise EngineFailure(f"rank {self.rank} of {self.size} is not connected to the others")
        try:
            start(self._group).wait()
        except RuntimeError as error:
            raise EngineFailure(f"rank {self.rank} of {self.size} lost another one: {_first_line(error)}") from error

    def _make_group(self, store: Any) -> Any:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            return dist.ProcessGroupNCCL(store, self.rank, self.size, options)
        gloo = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = self._timeout
        options._devices = [gloo.create_device(hostname=self._host)]
        return gloo(store, self.rank, self.size, options)


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
