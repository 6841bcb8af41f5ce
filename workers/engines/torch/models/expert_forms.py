"""Replacing how the experts of a decoder compute, after its weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from workers.engines.torch.layers.experts import Experts
from workers.engines.torch.layers.moe import MoeWeights
from workers.engines.torch.models.mistral4_weights import Mistral4Weights


def with_experts(weights: Mistral4Weights, form: Callable[[Experts], Experts]) -> Mistral4Weights:
    """The weights with the experts of every mixture in another form."""
    layers = []
    for layer in weights.layers:
        feed = layer.feed_forward
        if isinstance(feed, MoeWeights):
            feed = replace(feed, experts=form(feed.experts))
        layers.append(replace(layer, feed_forward=feed))
    return replace(weights, layers=tuple(layers))
