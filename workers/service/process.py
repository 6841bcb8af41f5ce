"""A worker as a process of its own.

    python -m workers.service.process SPEC.json [PARENT_PID]      (or `-`: the spec comes on stdin)

Logs are JSON lines on stderr. SIGTERM and SIGINT drain and stop, a second one stops at once. The process ends when its parent
does; with PARENT_PID also when that one ended before this one looked. Exit codes are in workers.service.lifecycle.ExitCode.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import structlog
from pydantic import ValidationError

from configs.env import log_level
from configs.worker_spec import WorkerSpec
from protos.contract.errors import ConfigError
from workers.kv_transfer.memory import keep_freed_memory
from workers.service.host import WorkerHost
from workers.service.lifecycle import ExitCode

_PARENT_POLL_S = 0.25
_SWITCH_INTERVAL_S = 0.001


def configure_logging(instance_id: str, rank: int) -> None:
    """Everything that is logged becomes one JSON object a line on stderr."""
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, lambda logger, name, event: {**event, "instance": instance_id, "rank": rank}],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=log_level().upper(), handlers=[handler], force=True)


def end_with_parent(parent_pid: int) -> None:
    """Ends this process when `parent_pid` is not its parent any more.

    A watching thread, not PR_SET_PDEATHSIG: that one fires when the thread that started the process ends.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(_PARENT_POLL_S)
        os._exit(ExitCode.ORPHANED)

    threading.Thread(target=watch, name="autan-parent", daemon=True).start()


def read_spec(source: str) -> WorkerSpec:
    """Reads a spec from a file, or from stdin for `-`. Raises ConfigError."""
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        return WorkerSpec.model_validate_json(text)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from error
    except ValidationError as error:
        raise ConfigError(f"{source}: {error}") from error


def prefer_short_turns() -> None:
    """Sockets wait for the interpreter while the engine computes in Python: shorter turns for both."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


async def serve(spec: WorkerSpec) -> ExitCode:
    """Runs the worker until it ends or a signal ends it."""
    host = WorkerHost(spec)
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        host.request_stop(spec.timing.drain_s if signals == 1 else 0.0)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return await host.run()


def main() -> None:
    """The command line."""
    if len(sys.argv) not in (2, 3):
        sys.stderr.write("usage: python -m workers.service.process SPEC.json [PARENT_PID]\n")
        raise SystemExit(ExitCode.BAD_SPEC)
    end_with_parent(int(sys.argv[2]) if len(sys.argv) == 3 else os.getppid())
    try:
        spec = read_spec(sys.argv[1])
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(ExitCode.BAD_SPEC) from error
    configure_logging(spec.instance_id, spec.rank)
    prefer_short_turns()
    keep_freed_memory()
    try:
        code = asyncio.run(serve(spec))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        code = ExitCode.BAD_SPEC
    logging.shutdown()
    # Threads of libraries must not keep a worker that has given everything back.
    os._exit(code)


if __name__ == "__main__":
    main()
