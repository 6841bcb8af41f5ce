"""`autan cancel REQUEST`."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.connect import Cluster, Json, Timeout, with_client
from orchestrator.cli.output import print_json, stdout


def cancel(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST")],
    cluster: Cluster = None,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Cancel a request in whatever stage it is. Idempotent; prints the state that it is in afterwards."""
    state = with_client(lambda client: client.cancel_any(request_id), cluster, timeout)
    if as_json:
        print_json({"request_id": request_id, "state": state})
    else:
        stdout.print(f"{request_id}: {state}")
