"""The Python client.

    from orchestrator.client import Client

    with Client() as client:
        for event in client.generate("Why is the sky blue?", max_tokens=64):
            print(event.text, end="")

`Client` and `AsyncClient` have the same methods; the former runs the latter on a loop of its own. Every failure is an error
of the tree in protos/contract/errors.py. A stream that breaks is resumed where it stopped, so tokens come once each. The
texts of all events of a stream, joined, are the answer.
"""

from __future__ import annotations

from orchestrator.client.blocking import Client
from orchestrator.client.connection import AsyncClient
from orchestrator.client.endpoint import find_endpoint, find_tls
from orchestrator.client.messages import Accepted, Completion, Delta, Event, Finished, TokenLogprobs, Turn

__all__ = [
    "Accepted",
    "AsyncClient",
    "Client",
    "Completion",
    "Delta",
    "Event",
    "Finished",
    "TokenLogprobs",
    "Turn",
    "find_endpoint",
    "find_tls",
]
