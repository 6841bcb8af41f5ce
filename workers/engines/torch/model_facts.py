"""What a configuration alone says of a model: parameters by block, bytes per number format, KV bytes per token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protos.contract.errors import ModelError
from workers.engines.torch.config import DecoderConfig
from workers.engines.torch.config_section import ConfigSection
from workers.engines.torch.number_formats import INT4_GROUPS, NVFP4_BLOCK
from workers.engines.torch.registry import shapes_of
from workers.engines.torch.stored_tensors import Piece, list_entries, place_tensors
from workers.engines.torch.tiny_files import ENCODINGS, Encoding, is_quantised
from workers.engines.torch.weights import DECODED_SUFFIX, keeps_compressed

BF16_BYTES = 2

# The published configuration, in the words of config.json; the presets that `inspect` knows by name.
PRESETS: dict[str, dict[str, Any]] = {
    "mistral-small-4": {
        "model_type": "mistral3",
        "tie_word_embeddings": False,
        "spatial_merge_size": 2,
        "text_config": {
            "model_type": "mistral4",
            "vocab_size": 131_072,
            "hidden_size": 4096,
            "intermediate_size": 12_288,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 0,
            "q_lora_rank": 1024,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 1_048_576,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 128.0,
                "original_max_position_embeddings": 8192,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        "vision_config": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "intermediate_size": 4096,
            "num_channels": 3,
            "patch_size": 14,
        },
    },
}


def preset(name: str) -> dict[str, Any]:
    """A published configuration. Raises ModelError for a name that is none."""
    if name not in PRESETS:
        raise ModelError(f"{name}: neither a folder nor a preset; presets are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]


def count_parameters(config: DecoderConfig, raw: Mapping[str, Any], where: str) -> dict[str, int]:
    """Parameters by block, with the image encoder and its projector when `raw` describes one. No block counts 0."""
    counts: Counter[str] = Counter()
    for name, shape in shapes_of(config).items():
        counts[_block(name)] += math.prod(shape)
    counts.update(_image_blocks(ConfigSection(raw, where), config.hidden_size))
    return dict(counts)


def _block(name: str) -> str:
    if ".self_attn." in name:
        return "attention"
    for part, block in ((".shared_experts.", "shared_experts"), (".experts.", "routed_experts"), (".mlp.gate.", "router")):
        if part in name:
            return block
    if ".mlp." in name:
        return "feed_forward"
    return {"model.embed_tokens.weight": "embeddings", "lm_head.weight": "lm_head"}.get(name, "norms")


def _image_blocks(outer: ConfigSection, text_hidden: int) -> dict[str, int]:
    """The Pixtral encoder and the projector with its patch merger, both without biases."""
    if not outer.has("vision_config"):
        return {}
    vision = outer.section("vision_config")
    hidden, inner = vision.integer("hidden_size"), vision.integer("intermediate_size")
    patch = vision.integer("num_channels") * vision.integer("patch_size") ** 2
    layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    merged = hidden * outer.integer("spatial_merge_size") ** 2
    return {
        "vision": hidden * patch + hidden + vision.integer("num_hidden_layers") * layer,
        "projector": hidden + merged * hidden + hidden * text_hidden + text_hidden * text_hidden,
    }


def bytes_per_format(config: DecoderConfig, parameters: int) -> dict[str, int]:
    """Bytes of all `parameters` in every format. One scale per whole tensor is left out: it is below a millionth."""
    return {encoding: _format_bytes(config, parameters, encoding) for encoding in ENCODINGS}


def _format_bytes(config: DecoderConfig, parameters: int, encoding: Encoding) -> int:
    if encoding == "fp32":
        return 4 * parameters
    total = BF16_BYTES * parameters
    for name, shape in shapes_of(config).items():
        if is_quantised(name, encoding):
            total += _stored_bytes(shape, encoding) - BF16_BYTES * math.prod(shape)
    return total


def _stored_bytes(shape: tuple[int, ...], encoding: Encoding) -> int:
    values = math.prod(shape)
    if encoding == "fp8":
        return values
    if encoding == "int8":
        return values + 4 * math.prod(shape[:-1])
    if encoding == "int4":
        return values // 2 + 4 * values // max(INT4_GROUPS)
    return values // 2 + values // NVFP4_BLOCK


def stored_bytes_by_format(model_dir: Path, config: DecoderConfig) -> dict[str, dict[str, int]]:
    """Per stored format of a checkpoint that fits: tensors of the decoder, their bytes on disk, and in memory in bf16.

    In memory an FP8 or NVFP4 weight has its scale of the whole matrix once per row; what the engine decodes counts as bf16.
    """
    shapes = shapes_of(config)
    entries, _ = list_entries(model_dir)
    places, _ = place_tensors(entries, shapes)
    found: dict[str, dict[str, int]] = {}
    for name, pieces in places.items():
        for piece in pieces:
            kind = piece.entries[0].dtype.lower() if piece.kind == "plain" else piece.kind
            sums = found.setdefault(kind, {"tensors": 0, "disk_bytes": 0, "memory_bytes": 0})
            sums["tensors"] += 1
            sums["disk_bytes"] += piece.stored_bytes
            sums["memory_bytes"] += _memory_bytes(name, piece)
    return found


def _memory_bytes(name: str, piece: Piece) -> int:
    rows = math.prod(piece.entries[0].shape[:-1])
    if not keeps_compressed(piece.kind) or name.endswith(DECODED_SUFFIX):
        return BF16_BYTES * rows * piece.width
    values, per_row = piece.entries[0].stored_bytes, 4 * rows
    if piece.kind == "int4":
        return values + 4 * math.prod(piece.entries[1].shape)
    return values + per_row + (piece.entries[1].stored_bytes if piece.kind == "nvfp4" else 0)


def kv_bytes_per_token(config: DecoderConfig) -> int:
    """Cached bytes per token over all layers in bf16."""
    return config.kv_row_values * config.num_layers * BF16_BYTES
