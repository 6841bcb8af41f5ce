"""`autan up`: the composition root. The one module that sees both the orchestrator and the workers' actor classes."""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import structlog
import typer

from configs.env import child_environment, log_level
from configs.load import load_cluster
from configs.schema.cluster import ClusterConfig
from orchestrator.cli.local_cluster import LocalCluster
from orchestrator.cli.output import print_json, stderr, stdout
from orchestrator.runtime.launcher import Launcher
from orchestrator.runtime.run_dir import RunDir, read_run_files
from protos.contract.errors import UnavailableError

_DETACH_MARGIN_S = 120.0
_LOG_TAIL_BYTES = 2000


def make_launcher(config: ClusterConfig, run_dir: RunDir) -> Launcher:
    """The launcher that the cluster file names; Ray loads only when it is asked for."""
    if config.launcher.kind == "subprocess":
        from orchestrator.runtime.subprocess_launcher import SubprocessLauncher

        return SubprocessLauncher(run_dir.path)
    from orchestrator.runtime.ray_launcher import RayLauncher
    from workers.service.ray_actor import CombinedWorker, DecodeWorker, PrefillWorker

    actors = {"prefill": PrefillWorker, "decode": DecodeWorker, "combined": CombinedWorker}
    return RayLauncher(config, actors)


def with_model_dir(config: ClusterConfig, directory: Path | None) -> ClusterConfig:
    """The same cluster over the checkpoint in `directory`, served under the folder's name, by the torch engine."""
    if directory is None:
        return config
    values = config.model_dump()
    values["model"] = {**values["model"], "name": directory.resolve().name, "source": str(directory.resolve())}
    for pool in values["pools"]:
        if pool["engine"]["kind"] == "oracle":
            pool["engine"]["kind"] = "torch"
    return ClusterConfig.model_validate(values)


def configure_logging(path: Path | None) -> None:
    """JSON lines, to a file or to stderr."""
    handler: logging.Handler = logging.FileHandler(path) if path else logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level=log_level().upper(), handlers=[handler], force=True)


async def serve(config: ClusterConfig, as_json: bool) -> None:
    """Runs the cluster until a signal or an operator ends it. The first signal drains, the second one stops at once."""
    run_dir = RunDir(config.name)
    run_dir.prepare()
    configure_logging(run_dir.logs / "orchestrator.log")
    started_s = time.monotonic()

    def progress(text: str) -> None:
        if not as_json:
            stderr.print(f"[{time.monotonic() - started_s:5.1f} s] {text}", markup=False)

    signals = asyncio.Event()
    loop = asyncio.get_running_loop()
    cluster = LocalCluster(config, make_launcher, progress=progress)
    starting = asyncio.current_task()
    assert starting is not None
    running = False

    def on_signal() -> None:
        if signals.is_set() or not running:
            starting.cancel()
        signals.set()
        cluster.stop_requested.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        async with cluster:
            running = True
            _announce(cluster, as_json)
            await cluster.stop_requested.wait()
            progress(f"draining, at most {cluster.stop_grace_s:.0f} s (Ctrl-C again stops at once)")
            if not await cluster.drain(cluster.stop_grace_s):
                progress("some requests did not finish in time")
    except asyncio.CancelledError:
        if not signals.is_set():
            raise
    progress("stopped")


def _announce(cluster: LocalCluster, as_json: bool) -> None:
    if as_json:
        print_json({"cluster": cluster.config.name, "endpoint": cluster.endpoint, "instances": sorted(cluster.fleet.groups)})
    else:
        names = ", ".join(sorted(cluster.fleet.groups))
        stdout.print(
            f"cluster {cluster.config.name} is up at {cluster.endpoint} ({names}); Ctrl-C drains and stops it", markup=False
        )


def start_detached(arguments: list[str], config: ClusterConfig) -> None:
    """Starts the same command in the background; returns when it is ready. Raises UnavailableError with its last output."""
    run_dir = RunDir(config.name)
    run_dir.prepare()
    log = run_dir.logs / "up.log"
    with log.open("wb") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli.main", "up", *arguments],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=child_environment(),
        )  # fmt: skip
    end_s = time.monotonic() + config.launcher.start_timeout_s + _DETACH_MARGIN_S
    while time.monotonic() < end_s:
        if any(entry.pid == child.pid for entry in read_run_files()):
            return
        code = child.poll()
        if code is not None:
            raise UnavailableError(f"the cluster did not start (exit code {code}):\n{_tail(log)}")
        time.sleep(0.05)
    child.terminate()
    raise UnavailableError(f"the cluster is not ready in time; the end of {log}:\n{_tail(log)}")


def _tail(path: Path) -> str:
    return path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()


def up(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Cluster file or preset name.")] = "laptop",
    model: Annotated[Path | None, typer.Option(help="Serve this checkpoint folder instead of the file's model.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when the cluster is ready; it goes on in the background.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Start a cluster and serve until Ctrl-C, which drains it. Progress goes to stderr."""
    config = with_model_dir(load_cluster(file), model)
    if not detach:
        asyncio.run(serve(config, as_json))
        return
    start_detached([file, *(["--model", str(model)] if model else [])], config)
    entry = next(one for one in read_run_files() if one.cluster == config.name)
    if as_json:
        print_json({"cluster": entry.cluster, "endpoint": entry.endpoint, "pid": entry.pid})
    else:
        stdout.print(f"cluster {entry.cluster} is up at {entry.endpoint} (process {entry.pid})", markup=False)
