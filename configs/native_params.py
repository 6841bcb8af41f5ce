"""Checkpoint folders in Mistral's own layout: how they are told apart, and params.json in the words of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from protos.contract.errors import ModelError

Layout = Literal["hf", "native"]

HF_INDEX, HF_SINGLE = "model.safetensors.index.json", "model.safetensors"
NATIVE_PARAMS, NATIVE_GLOB = "params.json", "consolidated*.safetensors"
_BOS, _EOS, _PAD = 1, 2, 11  # of every Mistral tokenizer; params.json does not repeat them
_COMMON = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
}
_DEFAULT_POSITIONS = 131_072
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_MOE = {
    "expert_hidden_dim": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
_OPTIONAL_MOE = {
    "first_k_dense_replace": "first_k_dense_replace",
    "routed_scale": "routed_scaling_factor",
    "num_expert_groups": "n_group",
    "num_expert_groups_per_tok": "topk_group",
}
_VISION = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_channels", "patch_size")


def layout_of_folder(model_dir: Path) -> Layout:
    """The layout that the files present speak for; with both copies in one folder it is "hf"."""
    if not (model_dir / NATIVE_PARAMS).is_file():
        return "hf"
    if not (model_dir / "config.json").is_file():
        return "native"
    if any((model_dir / name).is_file() for name in (HF_INDEX, HF_SINGLE)):
        return "hf"
    return "native" if any(model_dir.glob(NATIVE_GLOB)) else "hf"


def config_from_params(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content of the config.json that means the same. Raises ModelError that names a missing or malformed key."""
    text = _required(params, _COMMON, where)
    text |= {
        "model_type": _model_type(params),
        "num_key_value_heads": params.get("n_kv_heads"),
        "max_position_embeddings": params.get("max_position_embeddings") or _DEFAULT_POSITIONS,
        "hidden_act": params.get("activation") or "silu",
        "tie_word_embeddings": bool(params.get("tied_embeddings")),
        "attention_bias": params.get("use_biases"),
        "rope_interleave": True,
        "rope_parameters": _rope(params, where),
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
        "pad_token_id": _PAD,
    }
    if text["model_type"] != "mistral4":
        if params.get("moe"):
            raise ModelError(f"{where}: moe: experts without kv_lora_rank are not supported")
        text |= {"head_dim": params.get("head_dim"), "sliding_window": params.get("sliding_window")}
    else:
        text |= _required(params, {key: key for key in _LATENT}, where)
        text |= _moe(_object(params, "moe", where), f"{where}: moe")
    config: dict[str, Any] = {
        "model_type": "mistral3",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
        "text_config": {key: value for key, value in text.items() if value is not None},
        "quantization_config": _quantization(params, where),
    }
    if params.get("vision_encoder"):
        vision = _object(params, "vision_encoder", where)
        config["vision_config"] = {key: vision.get(key) for key in _VISION}
        config["spatial_merge_size"] = vision.get("spatial_merge_size")
    return config


def _model_type(params: Mapping[str, Any]) -> str:
    if params.get("kv_lora_rank"):
        return "mistral4"
    return "ministral3" if params.get("llama_4_scaling") else "mistral"


def _required(values: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    missing = [key for key in names if values.get(key) is None]
    if missing:
        raise ModelError(f"{where}: {', '.join(missing)}: is missing; restore the file")
    return {there: values[here] for here, there in names.items()}


def _object(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = values.get(key)
    if not isinstance(found, Mapping):
        raise ModelError(f"{where}: {key}: expected an object, found {found!r}; restore the file")
    return found


def _moe(moe: Mapping[str, Any], where: str) -> dict[str, Any]:
    if moe.get("route_every_n") not in (None, 1):
        raise ModelError(f"{where}: route_every_n: {moe['route_every_n']!r} is not supported; only 1 is")
    found = {there: moe[here] for here, there in _OPTIONAL_MOE.items() if moe.get(here) is not None}
    return {**_required(moe, _MOE, where), **found, "norm_topk_prob": True}


def _rope(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.get("rope_theta") or 10_000.0}
    if params.get("yarn"):
        yarn = _object(params, "yarn", where)
        rope |= _required(
            yarn,
            {
                "factor": "factor",
                "original_max_position_embeddings": "original_max_position_embeddings",
                "beta": "beta_fast",
                "alpha": "beta_slow",
            },
            f"{where}: yarn",
        )
        # Without the key the magnitude correction applies, which the decoder refuses.
        rope |= {"rope_type": "yarn", "apply_scale": yarn.get("apply_scale", True), "attention_factor": 1.0}
    if params.get("llama_4_scaling"):
        scaling = _object(params, "llama_4_scaling", where)
        names = {"beta": "llama_4_scaling_beta", "original_max_position_embeddings": "original_max_position_embeddings"}
        found = _required(scaling, names, f"{where}: llama_4_scaling")
        if rope.get("original_max_position_embeddings") not in (None, found["original_max_position_embeddings"]):
            raise ModelError(f"{where}: llama_4_scaling.original_max_position_embeddings: differs from that of yarn")
        rope |= found
    return rope


def _quantization(params: Mapping[str, Any], where: str) -> Mapping[str, Any] | None:
    if not params.get("quantization"):
        return None
    found = _object(params, "quantization", where)
    if found.get("quant_method"):
        return found
    if found.get("qformat_weight") != "fp8_e4m3" or found.get("qscheme_act") != "TENSOR":
        shown = f"qformat_weight {found.get('qformat_weight')!r} with qscheme_act {found.get('qscheme_act')!r}"
        raise ModelError(f"{where}: quantization: {shown} is not supported; fp8_e4m3 with TENSOR is")
    return {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
