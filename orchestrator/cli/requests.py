"""`autan requests`: what is queued and running."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.connect import Cluster, Json, Timeout, with_client
from orchestrator.cli.output import print_json, print_table


def requests(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, oldest first.")] = 100,
    cluster: Cluster = None,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """List the live requests of all tenants, oldest first."""
    found = with_client(lambda client: client.requests(limit), cluster, timeout)
    if as_json:
        print_json(
            [
                {
                    "request_id": one.request_id,
                    "tenant": one.tenant,
                    "state": one.state,
                    "epoch": one.epoch,
                    "prompt_tokens": one.prompt_tokens,
                    "completion_tokens": one.completion_tokens,
                    "prefill_instance": one.prefill_instance,
                    "decode_instance": one.decode_instance,
                    "age_s": round(one.age_s, 3),
                    "attempts": one.attempts,
                }
                for one in found
            ]
        )
        return
    print_table(
        ("request", "tenant", "state", "epoch", "prompt", "output", "prefill", "decode", "age", "attempts"),
        [
            (
                one.request_id, one.tenant, one.state, one.epoch, one.prompt_tokens, one.completion_tokens,
                one.prefill_instance, one.decode_instance, f"{one.age_s:.1f} s", one.attempts,
            )
            for one in found
        ],
    )  # fmt: skip
