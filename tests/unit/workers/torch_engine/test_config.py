from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from protos.contract.errors import ModelError
from workers.engines.torch.config import DenseConfig, Mistral4Config, parse_config, read_config
from workers.engines.torch.registry import shapes_of


@pytest.fixture
def llama(tiny_llama: Path) -> dict[str, Any]:
    return json.loads((tiny_llama / "config.json").read_text())


@pytest.fixture
def wrapped(tiny_mistral4: Path) -> dict[str, Any]:
    return json.loads((tiny_mistral4 / "config.json").read_text())


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one key set, or dropped when the value is `...`."""
    raw = copy.deepcopy(raw)
    *parents, key = path.split(".")
    section = raw
    for parent in parents:
        section = section[parent]
    section[key] = value
    if value is ...:
        del section[key]
    return raw


def test_dense_shape_with_old_and_new_rope_keys(llama: dict[str, Any]) -> None:
    old = parse_config(llama)
    new = parse_config(changed(changed(llama, "rope_theta", ...), "rope_parameters", {"rope_theta": 10000.0}))
    assert isinstance(old, DenseConfig)
    assert old == new
    assert (old.head_dim, old.kv_row_values, old.kv_layout_name) == (16, 64, "gqa:k+v")


def test_published_mistral_small_4_caches_320_values_per_layer(wrapped: dict[str, Any]) -> None:
    for key, value in {"kv_lora_rank": 256, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64}.items():
        wrapped = changed(wrapped, f"text_config.{key}", value)
    config = parse_config(wrapped)
    assert isinstance(config, Mistral4Config)
    assert (config.kv_row_values, config.qk_head_dim, config.rope.table_factor) == (320, 128, 1.0)


def test_published_mistral_small_4_has_its_number_of_parameters(wrapped: dict[str, Any]) -> None:
    """118,972,826,624 in the text decoder: closes only when every shape is right."""
    published = {
        "vocab_size": 131072, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 32, "q_lora_rank": 1024, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 2048, "n_routed_experts": 128,
    }  # fmt: skip
    shapes = shapes_of(parse_config({**wrapped, "text_config": {**wrapped["text_config"], **published}}))
    assert sum(math.prod(shape) for shape in shapes.values()) == 118_972_826_624


def test_the_text_part_alone_is_the_same_model(wrapped: dict[str, Any]) -> None:
    assert parse_config(wrapped["text_config"]) == parse_config(wrapped)


def test_a_dense_decoder_inside_the_wrapper(llama: dict[str, Any]) -> None:
    raw = {"model_type": "mistral3", "text_config": {**llama, "model_type": "mistral"}, "tie_word_embeddings": True}
    config = parse_config(raw)
    assert isinstance(config, DenseConfig)
    assert config.tie_word_embeddings  # the wrapper's word


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gpt2"),
        ("model_type", ...),
        ("vocab_size", 0),
        ("vocab_size", "many"),
        ("hidden_size", ...),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("sliding_window", 0),
        ("layer_types", ["full_attention"] * 2),
        ("layer_types", ["chunked_attention"] * 3),
        ("layer_types", ["sliding_attention"] * 3),
        ("layer_types", "full_attention"),
        ("num_key_value_heads", 5),
        ("head_dim", 15),
        ("rms_norm_eps", float("nan")),
        ("quantization_config", {"quant_method": "fp8"}),
        ("rope_scaling", {"rope_type": "longrope"}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", "linear"),
    ],
)
def test_dense_refusals_name_the_key(llama: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=key.removesuffix("_scaling")):
        parse_config(changed(llama, key, value))


MIXED = ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 20}, [20, 20, 20]),
        ({"model_type": "mistral", "sliding_window": None}, [None, None, None]),
        ({"model_type": "mistral", "sliding_window": 20, "use_sliding_window": False}, [None, None, None]),
        ({"model_type": "ministral", "sliding_window": 20, "layer_types": MIXED}, [None, 20, None]),
        ({"model_type": "ministral", "sliding_window": 20}, [20, 20, 20]),
        ({"sliding_window": 20, "layer_types": ["full_attention"] * 3}, [None, None, None]),
        ({"sliding_window": 20}, [None, None, None]),  # no llama decoder reads it
    ],
)
def test_windows_by_layer(llama: dict[str, Any], keys: dict[str, Any], windows: list[int | None]) -> None:
    config = parse_config({**llama, **keys})
    assert isinstance(config, DenseConfig)
    assert [config.window_of(layer) for layer in range(3)] == windows


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_group", 3),
        ("n_group", 8),
        ("topk_group", 2),
        ("scoring_func", "sigmoid"),
        ("q_lora_rank", ...),
        ("kv_lora_rank", ...),
        ("num_key_value_heads", 2),
        ("num_experts_per_tok", 9),
        ("qk_rope_head_dim", 15),
        ("n_shared_experts", 0),
        ("rope_interleave", "yes"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("rope_parameters.rope_type", "llama3"),
        ("rope_parameters.apply_scale", True),
        ("rope_parameters.factor", ...),
    ],
)
def test_mistral4_refusals_name_the_key(wrapped: dict[str, Any], key: str, value: Any) -> None:
    named = {"qk_rope_head_dim": "head_dim"}.get(key, key.rpartition(".")[2])
    with pytest.raises(ModelError, match=named):
        parse_config(changed(wrapped, f"text_config.{key}", value))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path)
