"""From a configuration to its decoder."""

from __future__ import annotations

from pathlib import Path

import torch

from workers.engines.torch.config import DecoderConfig, DenseConfig
from workers.engines.torch.models.decoder import Decoder
from workers.engines.torch.models.dense import DenseDecoder
from workers.engines.torch.models.mistral4 import Mistral4Decoder
from workers.engines.torch.weights import Progress, Shapes, open_checkpoint, silent


def shapes_of(config: DecoderConfig) -> Shapes:
    """Every tensor of a checkpoint of this configuration, by its name without a wrapper's prefix."""
    return DenseDecoder.shapes(config) if isinstance(config, DenseConfig) else Mistral4Decoder.shapes(config)


def load_decoder(
    config: DecoderConfig,
    model_dir: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = silent,
) -> Decoder:
    """Loads the weights, with progress. Raises ModelError that names every missing, extra and misshapen tensor."""
    with open_checkpoint(model_dir, shapes_of(config), dtype, device, progress) as checkpoint:
        if isinstance(config, DenseConfig):
            return DenseDecoder(config, checkpoint)
        return Mistral4Decoder(config, checkpoint)
