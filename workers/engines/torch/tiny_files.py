"""The weight files of tiny checkpoints: layouts, number formats and shards, as the published files have them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.native_params import Layout
from protos.contract.errors import ModelError
from workers.engines.torch.config import AUTAN_METHOD, DecoderConfig, DenseConfig
from workers.engines.torch.number_formats import INT4_GROUPS, NVFP4_BLOCK, fp8_encode, int4_encode, int8_encode, nvfp4_encode
from workers.engines.torch.tensor_names import NATIVE_EXPERT, NATIVE_GLOBALS, NATIVE_LAYER, expert_parts
from workers.engines.torch.tokenizer_files import write_json

Encoding = Literal["fp32", "bf16", "fp8", "nvfp4", "int8", "int4"]

LAYOUTS: tuple[Layout, ...] = ("hf", "native")
ENCODINGS: tuple[Encoding, ...] = ("fp32", "bf16", "fp8", "nvfp4", "int8", "int4")
_BORDERS = ("model.embed_tokens.weight", "lm_head.weight")
_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.(.+_proj(?:_with_mqa)?)(\.weight)?")
_TO_NATIVE_LAYER = {there: here for here, there in NATIVE_LAYER.items()}
_TO_NATIVE_GLOBAL = {there: here for here, there in NATIVE_GLOBALS.items()}
_TO_NATIVE_EXPERT = {there: here for here, there in NATIVE_EXPERT.items()}


def is_quantised(name: str, encoding: Encoding) -> bool:
    """Whether a format stores this weight in fewer bits than bf16: linear layers of the decoder; NVFP4, feed-forward only.

    int8 takes embedding and head along, which are a third of what a small model reads for a token. Otherwise they stay as
    they are, and so do router and norms in every format.
    """
    if encoding == "int8" and name in _BORDERS:
        return True
    match = _LINEAR.fullmatch(name)
    return match is not None and encoding not in ("fp32", "bf16") and (encoding != "nvfp4" or match[1] == "mlp")


def encode_tensors(tensors: Mapping[str, Tensor], layout: Layout, encoding: Encoding) -> dict[str, Tensor]:
    """The tensors as the format stores them; names in the decoder's words. Raises ModelError for widths that do not fit."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Experts are one tensor each in native files and in NVFP4 ones, and fused elsewhere.
        parts = expert_parts(name, tuple(tensor.shape)) if layout == "native" or encoding == "nvfp4" else []
        split = {part: tensor[expert, row : row + shape[0]] for part, shape, expert, row in parts}
        for part, values in (split or {name: tensor}).items():
            if is_quantised(name, encoding):
                stored |= _encode(part, values.contiguous(), encoding)
            else:
                stored[part] = values.to(torch.float32 if encoding == "fp32" else torch.bfloat16).contiguous()
    return stored


def _encode(name: str, values: Tensor, encoding: Encoding) -> dict[str, Tensor]:
    width = values.shape[-1]
    if not fits(width, encoding):
        hint = f"no group of {INT4_GROUPS} divides" if encoding == "int4" else f"is no multiple of {NVFP4_BLOCK}"
        raise ModelError(f"tiny {encoding}: {name} has {width} columns, which {hint}; use --set")
    stored = encode_weight(name, values, encoding)
    if encoding == "fp8":
        activation_scale = f"{name.removesuffix('.weight')}{'.' if name.endswith('.weight') else '_'}activation_scale"
        stored[activation_scale] = torch.tensor(1.0) if values.dim() == 2 else torch.ones(len(values))
    if encoding == "nvfp4":
        stored[f"{name.removesuffix('.weight')}.input_global_scale"] = torch.ones(1)
    return stored


def fits(width: int, encoding: Encoding) -> bool:
    """Whether a weight of this width divides into the groups of the format."""
    if encoding == "nvfp4":
        return width % NVFP4_BLOCK == 0
    return encoding != "int4" or any(width % group == 0 for group in INT4_GROUPS)


def encode_weight(name: str, values: Tensor, encoding: Encoding) -> dict[str, Tensor]:
    """One weight, or a stack of them, [..., out, in], in a compressed format that fits its width."""
    if encoding == "fp8":
        if values.dim() == 2:
            encoded, scale = fp8_encode(values)
            return {name: encoded, name + "_scale_inv": scale}
        many = [fp8_encode(part) for part in values]
        scales = torch.stack([scale for _, scale in many]).reshape(-1, 1, 1)
        return {name: torch.stack([part for part, _ in many]), name + "_scale_inv": scales}
    if encoding == "int8":
        encoded, scale = int8_encode(values)
        return {name: encoded, name + "_scale": scale}
    if encoding == "int4":
        group = next(group for group in reversed(INT4_GROUPS) if values.shape[-1] % group == 0)
        encoded, scale = int4_encode(values, group)
        return {name + "_packed": encoded, name + "_scale": scale}
    packed, scales, global_scale = nvfp4_encode(values)
    return {name + "_packed": packed, name + "_scale": scales, name + "_global_scale": global_scale}


def native_name(name: str) -> str:
    """The name in Mistral's own layout."""
    module, _, suffix = name.rpartition(".")
    suffix = {"weight_scale_inv": "qscale_weight", "activation_scale": "qscale_act"}.get(suffix, suffix)
    if module in _TO_NATIVE_GLOBAL:
        return f"{_TO_NATIVE_GLOBAL[module]}.{suffix}"
    _, _, layer, place = module.split(".", 3)
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(.+)", place)
    known = f"experts.{expert[1]}.{_TO_NATIVE_EXPERT[expert[2]]}" if expert else _TO_NATIVE_LAYER[place]
    return f"layers.{layer}.{known}.{suffix}"


def pairwise_rows(tensors: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Queries and keys of a dense decoder in the row order of native files, which rotate neighbouring rows."""
    if not isinstance(config, DenseConfig):
        return dict(tensors)
    changed = {}
    for name, tensor in tensors.items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        halves = tensor if heads is None else tensor.reshape(heads, 2, -1, tensor.shape[-1]).transpose(1, 2)
        changed[name] = halves.reshape(tensor.shape)
    return changed


def write_weights(folder: Path, tensors: Mapping[str, Tensor], layout: Layout, shards: int) -> None:
    """One file, or several with an index."""
    stem = "consolidated" if layout == "native" else "model"
    if shards == 1:
        save_file(dict(tensors), folder / f"{stem}.safetensors", metadata={"format": "pt"})
        (folder / f"{stem}.safetensors").chmod(0o644)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_cut(list(tensors), shards), start=1):
        file = f"{stem}-{number:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _cut(names: list[str], count: int) -> Iterator[list[str]]:
    if not 1 <= count <= len(names):
        raise ModelError(f"tiny: {count} shards of {len(names)} tensors")
    for number in range(count):
        yield names[number * len(names) // count : (number + 1) * len(names) // count]


def quantization_config(encoding: Encoding) -> dict[str, Any] | None:
    """What config.json says of the format; None for plain numbers."""
    if encoding == "fp8":
        return {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    if encoding == "nvfp4":
        return {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    if encoding in ("int8", "int4"):
        return {"quant_method": AUTAN_METHOD, "format": encoding}
    return None


def native_params(text: Mapping[str, Any], encoding: Encoding) -> dict[str, Any]:
    """The params.json that means the same as a text configuration."""
    rope = text.get("rope_parameters", {})
    params = {
        "dim": text["hidden_size"],
        "n_layers": text["num_hidden_layers"],
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "hidden_dim": text["intermediate_size"],
        "vocab_size": text["vocab_size"],
        "norm_eps": text["rms_norm_eps"],
        "max_position_embeddings": text["max_position_embeddings"],
        "tied_embeddings": text["tie_word_embeddings"],
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 10000.0)),
        "head_dim": text.get("head_dim"),
    }
    if text["model_type"] == "mistral4":
        params |= {key: text[key] for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")}
        params |= {"v_head_dim": text["v_head_dim"], "moe": _native_moe(text)}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "yarn":
        yarn = {"original_max_position_embeddings": original, "beta": rope["beta_fast"], "alpha": rope["beta_slow"]}
        params["yarn"] = {"factor": rope["factor"], "apply_scale": False, **yarn}
    if rope.get("llama_4_scaling_beta"):
        params["llama_4_scaling"] = {"beta": rope["llama_4_scaling_beta"], "original_max_position_embeddings": original}
    if encoding == "fp8":
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    elif quantization := quantization_config(encoding):
        params["quantization"] = quantization
    return {key: value for key, value in params.items() if value is not None}


def _native_moe(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "expert_hidden_dim": text["moe_intermediate_size"],
        "num_experts": text["n_routed_experts"],
        "num_experts_per_tok": text["num_experts_per_tok"],
        "num_shared_experts": text["n_shared_experts"],
        "first_k_dense_replace": text["first_k_dense_replace"],
        "routed_scale": text["routed_scaling_factor"],
        "num_expert_groups": text["n_group"],
        "num_expert_groups_per_tok": text["topk_group"],
        "route_every_n": 1,
    }
