"""config.json of Hugging Face gives the descriptions of the catalog."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from configs.catalog.hf_config import describe, read_hf_config
from configs.catalog.loader import model_named
from protos.contract.errors import ModelError

LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "q_lora_rank": 1536}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "vocab_size": 128256,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "vocab_size": 151936,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_position_embeddings": 40960,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "vocab_size": 129280,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "max_position_embeddings": 163840,
        "quantization_config": {"quant_method": "fp8"},
        **LATENT,
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "vocab_size": 201088,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "max_position_embeddings": 131072,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "qwen3.5-122b-a10b": {
        "model_type": "qwen3_5_moe",
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "hidden_size": 3072,
            "vocab_size": 248320,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "full_attention_interval": 4,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 64,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "moe_intermediate_size": 1024,
            "shared_expert_intermediate_size": 1024,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "attn_output_gate": True,
            "max_position_embeddings": 262144,
        },
        "tie_word_embeddings": False,
    },
    "nemotron-3-super": {
        "model_type": "nemotron_h",
        "hidden_size": 4096,
        "vocab_size": 131072,
        "hybrid_override_pattern": "ME" * 40 + "*" * 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "n_routed_experts": 512,
        "n_shared_experts": 1,
        "num_experts_per_tok": 22,
        "moe_intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "moe_latent_size": 1024,
        "mlp_hidden_act": "relu2",
        "intermediate_size": 21504,
        "max_position_embeddings": 262144,
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_description_is_that_of_the_catalog(name: str) -> None:
    ours = describe(CONFIGS[name], name)
    theirs = model_named(name)
    assert {str(blocks) for blocks in ours.blocks} == {str(blocks) for blocks in theirs.blocks}
    assert (ours.hidden, ours.vocab, ours.context_tokens) == (theirs.hidden, theirs.vocab, theirs.context_tokens)
    assert ours.default_format == theirs.default_format


def altered(name: str, **changes: object) -> Mapping[str, Any]:
    return {key: value for key, value in {**CONFIGS[name], **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (altered("llama-3.1-8b", hidden_size=None), "hidden_size is missing"),
        (altered("llama-3.1-8b", num_hidden_layers=-1), "num_hidden_layers is -1, no size"),
        (altered("llama-3.1-8b", num_hidden_layers=10**6), "above 4096"),
        (altered("gpt-oss-120b", layer_types=["holographic"] * 36), "'holographic' are not known"),
        (altered("nemotron-3-super", hybrid_override_pattern="MX"), "'X' are not known"),
        ({"text_config": [1]}, "text_config is no mapping"),
    ],
)
def test_what_is_not_understood_is_refused(config: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        describe(config, "x")


def test_a_folder_is_read_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "My Model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama-3.1-8b"]))
    assert read_hf_config(folder).name == "My-Model"
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no valid JSON"):
        read_hf_config(folder)
    with pytest.raises(ModelError, match="cannot be read"):
        read_hf_config(tmp_path / "none.json")
