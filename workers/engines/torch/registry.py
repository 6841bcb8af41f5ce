"""From a configuration to its decoder."""

from __future__ import annotations

from pathlib import Path

import torch

from workers.engines.torch.attention.torch_backend import TorchAttention
from workers.engines.torch.config import DecoderConfig, DenseConfig
from workers.engines.torch.layers.fixed_experts import FixedRowExperts
from workers.engines.torch.layers.grouped_experts import GroupedExperts
from workers.engines.torch.layers.tiles import FIXED_SIZES
from workers.engines.torch.models.decoder import Decoder
from workers.engines.torch.models.dense import DenseDecoder
from workers.engines.torch.models.dense_weights import DenseWeights, dense_shapes, load_dense
from workers.engines.torch.models.expert_forms import with_experts
from workers.engines.torch.models.mistral4 import Mistral4Decoder
from workers.engines.torch.models.mistral4_weights import Mistral4Weights, load_mistral4, mistral4_shapes
from workers.engines.torch.native.decoder import native_decoder
from workers.engines.torch.ranks import SOLO, Ranks
from workers.engines.torch.weights import Progress, Shapes, open_checkpoint, silent


def shapes_of(config: DecoderConfig) -> Shapes:
    """Every tensor of a checkpoint of this configuration, by its name without a wrapper's prefix."""
    return dense_shapes(config) if isinstance(config, DenseConfig) else mistral4_shapes(config)


def load_decoder(
    config: DecoderConfig,
    model_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = silent,
    ranks: Ranks = SOLO,
    *,
    compressed: bool = True,
    fixed_rows: bool = False,
    native_rows: int = 0,
) -> Decoder:
    """Loads this rank's weights, with progress; `compressed` weights stay as they are stored. `fixed_rows`: for FixedRowSteps.

    Batches of up to `native_rows` rows go through native CPU kernels where there are any for these weights; 0 leaves them
    out, and so do fixed rows and several ranks. Raises ModelError that names every missing, extra and misshapen tensor.
    """
    attention = TorchAttention(FIXED_SIZES if fixed_rows else None)
    weights: DenseWeights | Mistral4Weights
    decoder: Decoder
    with open_checkpoint(model_dir, shapes_of(config), dtype, device, progress, compressed=compressed) as checkpoint:
        if isinstance(config, DenseConfig):
            weights = load_dense(config, checkpoint, ranks)
            decoder = DenseDecoder(config, weights, attention, ranks)
        else:
            weights = load_mistral4(config, checkpoint, ranks)
            if fixed_rows:
                weights = with_experts(weights, FixedRowExperts)
            elif device.type == "cuda":
                weights = with_experts(weights, GroupedExperts.of)
            decoder = Mistral4Decoder(config, weights, attention, ranks)
    if fixed_rows or ranks.size > 1 or not native_rows:
        return decoder
    return native_decoder(config, weights, decoder, native_rows)
