"""The names that tensors have on disk, in the words of a Hugging Face text decoder without a wrapper's prefix.

A quantised weight `W` is stored as several tensors: `W` or `W_packed`, with `W_scale_inv` or `W_scale`, and for NVFP4
`W_global_scale`. The fused experts' own name carries the suffixes where a linear layer has `weight`.
"""

from __future__ import annotations

import re

from configs.native_params import Layout

_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
# The text decoder needs neither the image encoder nor buffers that old exporters saved.
_IMAGE_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "vision_encoder.",
    "vision_language_adapter.",
    "patch_merger.",
    "pre_mm_projector_norm.",
)
# Activations are computed in the engine's dtype, so their static scales have no use here.
_ACTIVATION_SUFFIXES = ("activation_scale", ".input_global_scale", ".input_scale", ".qscale_act")
_UNUSED_SUFFIXES = (".rotary_emb.inv_freq", *_ACTIVATION_SUFFIXES)

NATIVE_GLOBALS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
NATIVE_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "gate": "mlp.gate",
    "shared_experts.w1": "mlp.shared_experts.gate_proj",
    "shared_experts.w2": "mlp.shared_experts.down_proj",
    "shared_experts.w3": "mlp.shared_experts.up_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
NATIVE_EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.([a-z_]+)")
_EXPERT = re.compile(r"experts\.(\d+)\.(w[123])")
_FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")

Shape = tuple[int, ...]


def is_of_image_encoder(stored_name: str) -> bool:
    """Whether a tensor belongs to the image encoder or its projector."""
    return stored_name.startswith(_IMAGE_PREFIXES)


def is_activation_scale(stored_name: str) -> bool:
    """Whether a tensor is a static scale of activations, which only arithmetic in fewer bits on both sides would need."""
    return stored_name.endswith(_ACTIVATION_SUFFIXES)


def plain_name(stored_name: str, layout: Layout) -> str | None:
    """The name in the decoder's words; a name that the layout does not know as it is; None for what is passed over."""
    if stored_name.startswith(_IMAGE_PREFIXES) or stored_name.endswith(_UNUSED_SUFFIXES):
        return None
    if layout == "native":
        return _from_native(stored_name)
    for prefix, replacement in _PREFIXES:
        if stored_name.startswith(prefix):
            return replacement + stored_name[len(prefix) :]
    return stored_name


def _from_native(stored_name: str) -> str:
    if match := _LAYER.fullmatch(stored_name):
        layer, module, suffix = match.groups()
        if expert := _EXPERT.fullmatch(module):
            known: str | None = f"mlp.experts.{expert[1]}.{NATIVE_EXPERT[expert[2]]}"
        else:
            known = NATIVE_LAYER.get(module)
        place = f"model.layers.{layer}.{known}"
    else:
        module, _, suffix = stored_name.rpartition(".")
        known = place = NATIVE_GLOBALS.get(module, "")
    if not known:
        return stored_name
    return f"{place}.{'weight_scale_inv' if suffix == 'qscale_weight' else suffix}"


def expert_parts(name: str, shape: Shape) -> list[tuple[str, Shape, int, int]]:
    """The tensors that a fused tensor of experts is stored as, one per expert: name, shape, expert, first row.

    Empty for any other name.
    """
    match = _FUSED.fullmatch(name)
    if match is None:
        return []
    prefix, kind = match.groups()
    experts, rows, columns = shape
    if kind == "down_proj":
        return [(f"{prefix}.{expert}.down_proj.weight", (rows, columns), expert, 0) for expert in range(experts)]
    half = rows // 2
    return [
        (f"{prefix}.{expert}.{half_name}.weight", (half, columns), expert, first)
        for expert in range(experts)
        for half_name, first in (("gate_proj", 0), ("up_proj", half))
    ]
