"""What the commands that talk to a running cluster share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import typer

from orchestrator.client import AsyncClient, find_endpoint, find_tls

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Cluster = Annotated[str | None, typer.Option("--cluster", "-c", help="Name of the cluster, when several run here.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0.1, max=3600, help="Seconds to wait for an answer.")]


def with_client(work: Callable[[AsyncClient], Awaitable[T]], cluster: str | None, timeout_s: float) -> T:
    """Runs `work` with a client of the cluster and closes it. Raises what the client raises."""

    async def run() -> T:
        endpoint, tls = find_endpoint(cluster), find_tls(cluster)
        async with AsyncClient(endpoint, tls=tls, timeout_s=timeout_s, retry_s=timeout_s) as client:
            return await work(client)

    return asyncio.run(run())
