"""`autan migrate REQUEST --to INSTANCE`, `autan drain INSTANCE`, `autan undrain INSTANCE`."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.connect import Cluster, Json, Timeout, with_client
from orchestrator.cli.output import print_json, stdout


def migrate(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST")],
    target: Annotated[str, typer.Option("--to", metavar="INSTANCE", help="The decode instance that takes it over.")],
    cluster: Cluster = None,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Move a running request to another decode instance while it decodes. Returns when the move has begun."""
    epoch = with_client(lambda client: client.migrate(request_id, target), cluster, timeout)
    if as_json:
        print_json({"request_id": request_id, "target": target, "epoch": epoch})
    else:
        stdout.print(f"{request_id}: moves to {target} under epoch {epoch}")


def drain(
    instance_id: Annotated[str, typer.Argument(metavar="INSTANCE")],
    cluster: Cluster = None,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Give an instance no new work and move what decodes there elsewhere; what finds no room runs to its end. Idempotent."""
    _drain(instance_id, True, cluster, timeout, as_json)


def undrain(
    instance_id: Annotated[str, typer.Argument(metavar="INSTANCE")],
    cluster: Cluster = None,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Let an instance take work again. Idempotent."""
    _drain(instance_id, False, cluster, timeout, as_json)


def _drain(instance_id: str, on: bool, cluster: str | None, timeout: float, as_json: bool) -> None:
    moving = with_client(lambda client: client.drain(instance_id, on), cluster, timeout)
    if as_json:
        print_json({"instance_id": instance_id, "draining": on, "moving": moving})
    else:
        stdout.print(f"{instance_id}: {'drains' if on else 'takes work'}; {len(moving)} requests move")
