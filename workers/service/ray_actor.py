"""The worker as a Ray actor. Plain classes: the launcher turns them into actors, and Ray is imported inside one only.

    handle = ray.remote(PrefillWorker).options(name=..., max_restarts=-1, ...).remote(spec.model_dump_json())

The host runs on a thread with an event loop of its own. When it ends by itself the process ends too, so that Ray restarts the
actor; after `stop` it stays, so that Ray does not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from typing import Any

from configs.worker_spec import WorkerSpec
from protos.contract.errors import ConfigError
from workers.service.host import WorkerHost
from workers.service.lifecycle import ExitCode
from workers.service.process import configure_logging, prefer_short_turns

logger = logging.getLogger(__name__)

_STOP_MARGIN_S = 10.0


def on_this_node(spec: WorkerSpec) -> WorkerSpec:
    """The spec with the address that Ray gives this node, where the worker is to bind it: an actor may restart elsewhere."""
    if spec.network.bind != "node" or spec.node_address is not None:
        return spec
    import ray

    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return spec.model_copy(update={"node_address": address})


class WorkerActor:
    """One rank of one instance."""

    def __init__(self, spec_json: str) -> None:
        """Starts the worker and returns at once; `info` tells how far it is. Raises ValidationError for a bad spec."""
        self._spec = on_this_node(WorkerSpec.model_validate_json(spec_json))
        configure_logging(self._spec.instance_id, self._spec.rank)
        prefer_short_turns()
        self._host: WorkerHost | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self._code: ExitCode | None = None
        self._thread = threading.Thread(target=self._run, name="autan-worker", daemon=True)
        self._thread.start()

    def ping(self) -> int:
        """The process id: the actor answers."""
        return os.getpid()

    def info(self) -> dict[str, Any]:
        """Who this is and how far it is. `incarnation` is 0 until it is registered."""
        host = self._host
        return {
            "instance_id": self._spec.instance_id,
            "rank": self._spec.rank,
            "pid": os.getpid(),
            "address": host.address if host else "",
            "incarnation": host.me.number if host else 0,
            "state": host.me.state.value if host else "STARTING",
            "loading_percent": host.loading.percent if host else None,
        }

    def stop(self, grace_s: float = 0.0) -> int:
        """Drains for at most `grace_s`, stops and returns the exit code. The actor is then an empty shell: kill it."""
        self._stopping = True
        host, loop = self._host, self._loop
        if host is not None and loop is not None and self._thread.is_alive():
            loop.call_soon_threadsafe(host.request_stop, grace_s)
        self._thread.join(grace_s + _STOP_MARGIN_S)
        return int(self._code if self._code is not None else ExitCode.FAILED)

    def _run(self) -> None:
        code = ExitCode.FAILED
        try:
            code = asyncio.run(self._serve())
        except ConfigError as error:
            logger.error("%s cannot start: %s", self._spec.instance_id, error)
            code = ExitCode.BAD_SPEC
        except Exception:
            logger.exception("the worker failed")
        finally:
            self._code = code
            if not self._stopping:
                logging.shutdown()
                os._exit(code)

    async def _serve(self) -> ExitCode:
        self._loop = asyncio.get_running_loop()
        self._host = WorkerHost(self._spec)
        return await self._host.run()


class PrefillWorker(WorkerActor):
    """A worker of a prefill pool; the name is what `ray list actors` shows."""


class DecodeWorker(WorkerActor):
    """A worker of a decode pool."""


class CombinedWorker(WorkerActor):
    """A worker of a combined pool."""
