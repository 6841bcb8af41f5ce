"""`autan down`: drain and stop a running cluster."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from orchestrator.cli.connect import Cluster, Json, Timeout, with_client
from orchestrator.cli.output import print_json, stdout
from orchestrator.runtime.run_dir import read_run_files
from protos.contract.errors import UnavailableError

_STOP_MARGIN_S = 30.0


def down(
    cluster: Cluster = None,
    grace: Annotated[float, typer.Option(min=0, max=86_400, help="Seconds that running requests get to finish.")] = 30.0,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Stop a cluster: no new requests, running ones finish within the grace, then everything ends. Returns when it is gone."""
    running = {entry.cluster: entry.pid for entry in read_run_files()}
    with_client(lambda client: client.shutdown(grace), cluster, timeout)
    name = cluster or next(iter(running), None)
    pid = running.get(name or "")
    if pid is not None and not _is_gone_within(name or "", grace + _STOP_MARGIN_S):
        raise UnavailableError(
            f"cluster {name} (process {pid}) has not ended {grace + _STOP_MARGIN_S:.0f} s after it was asked to"
        )
    if as_json:
        print_json({"cluster": name, "stopped": True})
    else:
        stdout.print(f"cluster {name or ''} is down")


def _is_gone_within(name: str, timeout_s: float) -> bool:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if all(entry.cluster != name for entry in read_run_files()):
            return True
        time.sleep(0.1)
    return False
