"""`autan migrate REQUEST --to INSTANCE`, `autan drain INSTANCE`, `autan undrain INSTANCE`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from orchestrator.cli.connect import Cluster, Json, Timeout, with_client
from orchestrator.cli.output import print_json, stderr, stdout
from protos.contract.errors import HandoffTimeout

_POLL_S = 0.25


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
    wait: Annotated[
        float, typer.Option(min=0, max=86_400, help="Seconds to wait until nothing is left there, with progress on stderr.")
    ] = 0.0,
    cluster: Cluster = None,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Give an instance no new work and move what decodes there elsewhere, as room comes free. Idempotent.

    What finds no room until then runs to its end. With --wait it returns 1 when something is left at the end.
    """
    _drain(instance_id, True, cluster, timeout, as_json)
    if wait and not _is_empty_within(instance_id, wait, cluster, timeout):
        raise HandoffTimeout(f"{instance_id} still has requests after {wait:.0f} s; it goes on draining")


def undrain(
    instance_id: Annotated[str, typer.Argument(metavar="INSTANCE")],
    cluster: Cluster = None,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Let an instance take work again. Idempotent."""
    _drain(instance_id, False, cluster, timeout, as_json)


def _is_empty_within(instance_id: str, wait_s: float, cluster: str | None, timeout: float) -> bool:
    """Polls until the instance has no request, and says how many are left whenever that changes."""
    end_s, told = time.monotonic() + wait_s, ""
    while True:
        status = with_client(lambda client: client.status(), cluster, timeout)
        one = next((one for one in status.instances if one.instance_id == instance_id), None)
        if one is None or not one.assigned_requests:
            return True
        text = f"{instance_id}: {one.assigned_requests} requests left, {one.moves_out} of them move"
        if text != told:
            stderr.print(text, markup=False)
        told = text
        if time.monotonic() >= end_s:
            return False
        time.sleep(_POLL_S)


def _drain(instance_id: str, on: bool, cluster: str | None, timeout: float, as_json: bool) -> None:
    moving = with_client(lambda client: client.drain(instance_id, on), cluster, timeout)
    if as_json:
        print_json({"instance_id": instance_id, "draining": on, "moving": moving})
    else:
        stdout.print(f"{instance_id}: {'drains' if on else 'takes work'}; {len(moving)} requests move")
