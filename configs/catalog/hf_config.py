"""A model description from a Hugging Face config.json: dense, experts, latent attention, windows, recurrent blocks.

The families are told apart by the keys they have, so a new model of a known shape needs no code; what the keys do not say
(norms of queries, biases) goes by `model_type`. What is not understood is refused, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.schema.model_description import (
    Blocks,
    DenseFfn,
    Ffn,
    GatedDelta,
    GroupedAttention,
    LatentAttention,
    Mamba2,
    Mixer,
    ModelDescription,
    MoeFfn,
    WeightFormat,
)
from protos.contract.errors import ModelError

MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_LAYERS = 4096
_HEAD_NORMED = re.compile(r"qwen3|gemma3|glm4_moe|olmo3")
_TWO_MATRICES = frozenset({"relu2", "gelu_new", "gelu_fast"})
_NEMOTRON_KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
_EXPERT_KEYS = ("n_routed_experts", "num_local_experts", "num_experts")


def read_hf_config(path: Path) -> ModelDescription:
    """The description of a config.json, or of the folder that holds it. Raises ModelError that says what is not understood."""
    file = path / "config.json" if path.is_dir() else path
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_JSON_BYTES + 1)
        config = json.loads(raw) if len(raw) <= MAX_JSON_BYTES else None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}; give a config.json or the folder that holds it") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: is no valid JSON ({error}); restore the file") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: holds no JSON object of at most {MAX_JSON_BYTES} bytes; restore the file")
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", (file.parent if file.name == "config.json" else file).resolve().stem)[:64] or "model"
    return describe(config, name, str(file))


def describe(config: Mapping[str, Any], name: str, source: str = "config.json") -> ModelDescription:
    """As read_hf_config, for the values themselves. Encoders of images are left out: their weights are not in these keys."""
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        raise ModelError(f"{source}: text_config is no mapping; restore the file")
    reader = _Reader({**text, "model_type": text.get("model_type") or config.get("model_type") or ""}, source)
    kinds = reader.layer_kinds()
    layers = [(reader.mixer(kind, index), reader.ffn(kind, index)) for index, kind in enumerate(kinds)]
    try:
        return ModelDescription(
            name=name,
            title=name,
            source=source,
            hidden=reader.size("hidden_size"),
            vocab=reader.size("vocab_size"),
            tied_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
            context_tokens=reader.size("max_position_embeddings"),
            default_format=_weights(config.get("quantization_config") or text.get("quantization_config")),
            blocks=_grouped(layers),
        )
    except ValidationError as invalid:
        said = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in invalid.errors(include_url=False))
        raise ModelError(f"{source}: {said}; these values describe no model") from invalid


class _Reader:
    """Typed access to the decoder's keys."""

    def __init__(self, keys: Mapping[str, Any], source: str) -> None:
        self.keys = keys
        self.source = source
        self.kind = str(keys["model_type"])

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of the keys that is set. Raises ModelError when none is and there is no default."""
        for key in names:
            value = self.keys.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 100_000_000:
                raise ModelError(f"{self.source}: {key} is {value!r}, no size; correct the file")
            return value
        if default is None:
            raise ModelError(f"{self.source}: {' or '.join(names)} is missing; {self.kind or 'this model'} cannot be counted")
        return default

    def layer_kinds(self) -> list[str]:
        """One word for each block: full, sliding, linear, mamba, attention, moe or mlp (the last four stand alone)."""
        pattern = self.keys.get("hybrid_override_pattern")
        if isinstance(pattern, str):
            return [self._known(letter, _NEMOTRON_KINDS) for letter in pattern[:MAX_LAYERS]]
        alone = self.keys.get("layers_block_type")
        if isinstance(alone, Sequence) and not isinstance(alone, str):
            known = {"mamba": "mamba", "linear_attention": "mamba", "attention": "attention", "full_attention": "attention"}
            return [self._known(word, {**known, "moe": "moe", "mlp": "mlp"}) for word in alone[:MAX_LAYERS]]
        layers = self.size("num_hidden_layers")
        if layers > MAX_LAYERS:
            raise ModelError(f"{self.source}: num_hidden_layers {layers} is above {MAX_LAYERS}; correct the file")
        named = self.keys.get("layer_types")
        if isinstance(named, Sequence) and not isinstance(named, str) and len(named) == layers:
            known = {
                "full_attention": "full",
                "sliding_attention": "sliding",
                "linear_attention": "linear",
                "attention": "full",
                "indexed_attention": "full",
            }
            return [self._known(word, known) for word in named]
        return self._kinds_by_rule(layers)

    def _kinds_by_rule(self, layers: int) -> list[str]:
        if "linear_num_value_heads" in self.keys:
            every = self.size("full_attention_interval", default=4)
            return ["full" if (index + 1) % every == 0 else "linear" for index in range(layers)]
        window = self.keys.get("sliding_window")
        if not window or self.keys.get("use_sliding_window") is False or self.kind.startswith(("qwen2", "qwen3")):
            return ["full"] * layers
        if self.kind == "gpt_oss":
            return ["full" if index % 2 else "sliding" for index in range(layers)]
        every = self.size("sliding_window_pattern", default=0)
        return ["full" if every and (index + 1) % every == 0 else "sliding" for index in range(layers)]

    def _known(self, word: object, known: Mapping[str, str]) -> str:
        if not isinstance(word, str) or word not in known:
            raise ModelError(f"{self.source}: blocks of kind {word!r} are not known (known: {', '.join(known)})")
        return known[word]

    def mixer(self, kind: str, index: int) -> Mixer | None:
        """What mixes tokens in a block of this kind."""
        if kind in ("moe", "mlp"):
            return None
        if kind == "mamba":
            return Mamba2(
                heads=self.size("mamba_num_heads"),
                head_dim=self.size("mamba_head_dim"),
                groups=self.size("n_groups"),
                state_dim=self.size("ssm_state_size"),
                conv_width=self.size("conv_kernel"),
            )
        if kind == "linear":
            return GatedDelta(
                key_heads=self.size("linear_num_key_heads"),
                value_heads=self.size("linear_num_value_heads"),
                key_dim=self.size("linear_key_head_dim"),
                value_dim=self.size("linear_value_head_dim"),
                conv_width=self.size("linear_conv_kernel_dim"),
            )
        return self._latent() if self.keys.get("kv_lora_rank") else self._attention(kind)

    def _latent(self) -> LatentAttention:
        indexed = self.size("index_topk", default=0)
        return LatentAttention(
            heads=self.size("num_attention_heads"),
            q_rank=self.size("q_lora_rank", default=0) or None,
            kv_rank=self.size("kv_lora_rank"),
            nope_dim=self.size("qk_nope_head_dim"),
            rope_dim=self.size("qk_rope_head_dim"),
            value_dim=self.size("v_head_dim"),
            index_heads=self.size("index_n_heads") if indexed else 0,
            index_dim=self.size("index_head_dim") if indexed else 0,
            index_picks=indexed,
        )

    def _attention(self, kind: str) -> GroupedAttention:
        heads = self.size("num_attention_heads")
        biased = bool(self.keys.get("attention_bias")) or self.kind == "gpt_oss"
        row_normed = self.kind.startswith("minimax_m2")
        return GroupedAttention(
            heads=heads,
            kv_heads=self.size("num_key_value_heads", default=heads),
            head_dim=self.size("head_dim", default=self.size("hidden_size") // max(heads, 1)),
            window=self.size("sliding_window") if kind == "sliding" else None,
            qk_norm="row" if row_normed else "head" if _HEAD_NORMED.match(self.kind) else "none",
            qkv_bias=biased or self.kind.startswith("qwen2"),
            out_bias=biased,
            sinks=self.kind == "gpt_oss",
            output_gate=bool(self.keys.get("attn_output_gate")) or self.kind.startswith(("qwen3_next", "qwen3_5")),
        )

    def ffn(self, kind: str, index: int) -> Ffn | None:
        """The feed-forward layer of a block."""
        if kind in ("mamba", "attention"):
            return None
        experts = next((int(self.keys[key]) for key in _EXPERT_KEYS if self.keys.get(key)), 0)
        if kind == "mlp" or not experts or (kind != "moe" and self._is_dense(index)):
            return DenseFfn(width=self.size("intermediate_size"), gated=self._gated(kind))
        width = self.size("moe_intermediate_size", "intermediate_size")
        shared = self.size("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", default=0)
        return MoeFfn(
            experts=experts,
            picks=self.size("num_experts_per_tok"),
            expert_width=width,
            shared_width=shared or self.size("n_shared_experts", default=0) * width,
            gated=self._gated(kind),
            latent=self.size("moe_latent_size", default=0) or None,
            biases=self.kind == "gpt_oss",
            router_bias=self.kind.startswith(("gpt_oss", "deepseek_v3", "kimi", "glm", "minimax", "nemotron")),
            shared_gate=self.kind.startswith(("qwen2_moe", "qwen3_next", "qwen3_5")),
        )

    def _gated(self, kind: str) -> bool:
        alone = kind in ("moe", "mlp")
        return str(self.keys.get("mlp_hidden_act" if alone else "hidden_act", "silu")) not in _TWO_MATRICES

    def _is_dense(self, index: int) -> bool:
        named = self.keys.get("mlp_only_layers") or ()
        every = self.size("decoder_sparse_step", "moe_layer_freq", default=1) or 1
        dense_first = index < self.size("first_k_dense_replace", default=0)
        by_step = (index + 1) % every != 0 if "decoder_sparse_step" in self.keys else index % every != 0
        return dense_first or index in named or by_step


def _grouped(layers: Sequence[tuple[Mixer | None, Ffn | None]]) -> tuple[Blocks, ...]:
    """Equal blocks together, in order of first appearance."""
    counted: dict[tuple[Mixer | None, Ffn | None], int] = {}
    for layer in layers:
        counted[layer] = counted.get(layer, 0) + 1
    return tuple(Blocks(count=count, mixer=mixer, ffn=ffn) for (mixer, ffn), count in counted.items())


def _weights(quantised: object) -> WeightFormat:
    """The format of the weights, from `quantization_config`."""
    if not isinstance(quantised, Mapping):
        return "bf16"
    said = f"{quantised.get('quant_method', '')} {quantised.get('quant_algo', '')} {quantised.get('format', '')}".lower()
    bits = quantised.get("bits") or quantised.get("weight_bits")
    named: tuple[tuple[str, WeightFormat], ...] = (
        ("mxfp4", "mxfp4"),
        ("nvfp4", "nvfp4"),
        ("fp8", "fp8"),
        ("float-quantized", "fp8"),
    )
    for word, weights in named:
        if word in said:
            return weights
    return "int4" if bits == 4 else "int8" if bits == 8 or "int8" in said or "int-quantized" in said else "bf16"
