"""Turns what a runner says of layer groups into what the engine says of sequences."""

from __future__ import annotations

from collections.abc import Sequence

from workers.batching.runner import OnGroups
from workers.batching.scheduler import Chunk
from workers.engine_api.protocol import OnLayers
from workers.engine_api.types import LayerProgress, Phase


def told_by_layers(chunks: Sequence[Chunk], on_layers: OnLayers) -> OnGroups | None:
    """What to give a runner so that `on_layers` hears of these chunks; None when none of them is to be handed over."""
    ends = [
        (*chunk.sequence.key, chunk.sequence.num_computed + chunk.count, len(chunk.sequence.tokens))
        for chunk in chunks
        if chunk.sequence.request.phase is Phase.PREFILL
    ]
    if not ends:
        return None

    def tell(groups: int) -> None:
        on_layers(tuple(LayerProgress(*end, groups) for end in ends))

    return tell
