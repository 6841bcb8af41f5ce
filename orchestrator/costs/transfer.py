"""How long the cache of a prompt takes to its decode instance, and how much of that the prompt's own computing hides."""

from __future__ import annotations

from orchestrator.costs.number import Number, larger


def transfer_s(size_bytes: Number, bytes_per_s: Number, latency_s: Number, sharing: Number = 1.0) -> Number:
    """One transfer at a time that `sharing` transfers divide the link."""
    return latency_s + size_bytes * sharing / bytes_per_s


def exposed_s(size_bytes: Number, layers: Number, prefill_s: Number, bytes_per_s: Number, latency_s: Number) -> Number:
    """What is left after the prompt is computed when each layer is sent as soon as it is done.

    The last layer is always exposed; the ones before it are where sending a layer takes longer than computing one. Never
    more than sending everything afterwards, layer by layer; never less than the last layer.
    """
    layer_s = transfer_s(size_bytes / layers, bytes_per_s, latency_s)
    behind = (layers - 1.0) * (layer_s - prefill_s / layers)
    return layer_s + larger(behind, 0.0)


def exposed_stepwise_s(size_bytes: float, layers: int, prefill_s: float, bytes_per_s: float, latency_s: float) -> float:
    """As exposed_s, layer by layer on a clock: the slow twin."""
    sent_s = 0.0
    for layer in range(1, layers + 1):
        ready_s = prefill_s * layer / layers
        sent_s = max(sent_s, ready_s) + latency_s + size_bytes / layers / bytes_per_s
    return sent_s - prefill_s
