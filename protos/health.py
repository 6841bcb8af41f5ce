"""grpc.health.v1 as every server of ours has it."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]
    """The library's; List is left out by it, and said so instead of failing."""

    async def List(self, request: Any, context: Any) -> None:
        """UNIMPLEMENTED."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask Check or Watch")
