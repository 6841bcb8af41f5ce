"""Random tiny checkpoints in the published file formats, for tests and trials. Text only: no image encoder is written."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.native_params import Layout
from protos.contract.errors import ModelError
from workers.engines.torch.config import DecoderConfig, parse_config
from workers.engines.torch.registry import shapes_of
from workers.engines.torch.tiny_files import (
    Encoding,
    encode_tensors,
    native_name,
    native_params,
    pairwise_rows,
    quantization_config,
    write_weights,
)
from workers.engines.torch.tokenizer_files import byte_tokenizer_files, write_json

KINDS = ("mistral-small-4", "llama", "mistral", "ministral", "ministral3")
_NATIVE_KINDS = ("mistral-small-4", "mistral", "ministral3")
_OPTIONAL_KEYS = {"rope_parameters", "rope_scaling", "sliding_window", "use_sliding_window", "layer_types"}
_NUM_SPECIAL, _NUM_BYTES = 16, 256

_MISTRAL4_TEXT: dict[str, Any] = {
    "model_type": "mistral4",
    "vocab_size": _NUM_SPECIAL + _NUM_BYTES,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 11,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
        "partial_rotary_factor": 0.5,
    },
}

_DENSE: dict[str, Any] = {
    "vocab_size": _NUM_SPECIAL + _NUM_BYTES,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 11,
    "rope_theta": 10000.0,
}


_MINISTRAL3_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def write_tiny(
    kind: str,
    out_dir: Path,
    seed: int,
    *,
    layout: Layout = "hf",
    encoding: Encoding = "fp32",
    shards: int = 1,
    **dims: Any,
) -> Path:
    """Writes a checkpoint of the kind with random weights and a byte-level tokenizer; returns `out_dir`.

    `dims` replace values of the text configuration. Equal arguments give equal files, and equal seeds equal weights
    before encoding in every layout. Raises ModelError for an unknown kind or key, for values that do not fit each
    other, and when `out_dir` exists; it appears whole or not at all.
    """
    if out_dir.exists():
        raise ModelError(f"{out_dir}: exists already; give a new folder or remove this one")
    raw = _configuration(kind, dims)
    config = parse_config(raw, f"tiny {kind}")
    if config.vocab_size < _NUM_SPECIAL + _NUM_BYTES:
        raise ModelError(f"tiny {kind}: vocab_size: needs at least {_NUM_SPECIAL + _NUM_BYTES} for the byte-level tokenizer")
    if layout == "native" and kind not in _NATIVE_KINDS:
        raise ModelError(f"tiny {kind}: there is no native layout of it; {', '.join(_NATIVE_KINDS)} have one")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _write_model(staging, raw, config, seed, layout, encoding, shards)
        write_json(staging / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11})
        for name, content in byte_tokenizer_files(config.vocab_size, _NUM_SPECIAL).items():
            write_json(staging / name, content)
        staging.chmod(0o755)
        staging.rename(out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out_dir


def _write_model(
    folder: Path, raw: dict[str, Any], config: DecoderConfig, seed: int, layout: Layout, encoding: Encoding, shards: int
) -> None:
    tensors = random_tensors(config, seed)
    if layout == "native":
        stored = encode_tensors(pairwise_rows(tensors, config), layout, encoding)
        write_weights(folder, {native_name(name): tensor for name, tensor in stored.items()}, layout, shards)
        write_json(folder / "params.json", native_params(raw.get("text_config", raw), encoding))
        return
    prefix = "language_model." if raw["model_type"] == "mistral3" else ""
    stored = encode_tensors(tensors, layout, encoding)
    write_weights(folder, {prefix + name: tensor for name, tensor in stored.items()}, layout, shards)
    if encoding != "fp32":
        raw = {**raw, "torch_dtype": "bfloat16"}
    if quantization := quantization_config(encoding):
        raw = {**raw, "quantization_config": quantization}
    write_json(folder / "config.json", raw)


def random_tensors(config: DecoderConfig, seed: int) -> dict[str, Tensor]:
    """Fp32 weights whose activations and logits keep unit scale, so that greedy choices are clear."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes_of(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = 1 + 0.1 * noise
        elif name.endswith("embed_tokens.weight"):
            tensors[name] = noise
        else:
            tensors[name] = noise * shape[-1] ** -0.5
    return tensors


def _configuration(kind: str, dims: dict[str, Any]) -> dict[str, Any]:
    if kind not in KINDS:
        raise ModelError(f"no tiny model of kind {kind!r}; one of {', '.join(KINDS)}")
    text = json.loads(json.dumps(_MISTRAL4_TEXT if kind == "mistral-small-4" else {"model_type": kind, **_DENSE}))
    if kind == "ministral3":
        text["rope_parameters"] = dict(_MINISTRAL3_ROPE)
    known = set(text) | _OPTIONAL_KEYS
    unknown = sorted(set(dims) - known)
    if unknown:
        raise ModelError(f"tiny {kind}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    text.update(dims)
    if kind != "mistral-small-4":
        return {"architectures": [f"{kind.capitalize()}ForCausalLM"], "torch_dtype": "float32", **text}
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": "float32",
        "text_config": text,
    }
