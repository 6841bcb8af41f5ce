"""Which copy of a checkpoint is read, what is refused and how it is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.model_card import read_model_card
from configs.native_params import config_from_params, layout_of_folder
from protos.contract.errors import ModelError
from tests.support.torch_models import a_runner
from workers.engines.torch.config import read_config
from workers.engines.torch.layers.compressed_experts import CompressedExperts
from workers.engines.torch.layers.compressed_linear import Fp8Linear
from workers.engines.torch.registry import load_decoder, shapes_of
from workers.engines.torch.tiny import write_tiny
from workers.engines.torch.weights import open_checkpoint

KIND = "mistral-small-4"
LAYER = "model.layers.1."


def change(folder: Path, stem: str, changes: dict[str, torch.Tensor | None]) -> None:
    path = folder / f"{stem}.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        a_runner(folder)
    return str(caught.value)


def test_faults_of_a_native_fp8_folder_are_named(tmp_path: Path) -> None:
    folder = write_tiny(KIND, tmp_path / "m", 1, layout="native", encoding="fp8", num_hidden_layers=2)
    wide = torch.zeros(3, dtype=torch.float8_e4m3fn)
    change(
        folder,
        "consolidated",
        {
            "layers.1.experts.5.w3.weight": None,
            "layers.1.experts.6.w2.qscale_weight": None,
            "layers.1.attention.wo.qscale_weight": torch.ones(2),
            "layers.1.attention_norm.weight": torch.zeros(128, dtype=torch.float8_e4m3fn),
            "layers.1.attention.wq_a.weight": wide,
            "layers.1.attention.surplus.weight": torch.zeros(1),
            "vision_encoder.ln_pre.weight": torch.zeros(1),
        },
    )
    message = refusal(folder)
    assert f"{LAYER}mlp.experts.5.up_proj.weight is missing" in message
    assert f"{LAYER}mlp.experts.6.down_proj.weight is stored as fp8 and its scale is missing" in message
    assert f"{LAYER}self_attn.o_proj.weight: its scale has shape [2]" in message
    assert f"{LAYER}input_layernorm.weight has dtype F8_E4M3" in message
    assert f"{LAYER}self_attn.q_a_proj.weight has shape [3] instead of [48, 128]" in message
    assert "layers.1.attention.surplus.weight is not part of the model" in message
    assert "vision" not in message


def test_faults_of_an_nvfp4_folder_are_named(tmp_path: Path) -> None:
    folder = write_tiny(KIND, tmp_path / "m", 1, encoding="nvfp4", num_hidden_layers=2)
    expert = "language_model.model.layers.1.mlp.experts."
    change(
        folder,
        "model",
        {
            expert + "0.up_proj.weight_scale": torch.ones(64, 4).to(torch.float8_e4m3fn),
            expert + "1.up_proj.weight_packed": torch.zeros(64, 63, dtype=torch.uint8),
            expert + "2.up_proj.weight_global_scale": torch.ones(2),
            expert + "3.up_proj.weight_global_scale": None,
            expert + "4.up_proj.weight_scale": None,
        },
    )
    message = refusal(folder)
    mine = f"{LAYER}mlp.experts."
    assert f"{mine}0.up_proj.weight: its scale has shape [64, 4]" in message
    assert f"{mine}1.up_proj.weight has shape [64, 63] instead of [64, 64]" in message
    assert f"{mine}2.up_proj.weight: its global scale has shape [2]" in message
    assert f"{mine}3.up_proj.weight: its scale has shape [64, 8], which does not fit int4" in message
    assert f"{mine}4.up_proj.weight is stored as nvfp4 and its scale is missing" in message


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_faults_of_our_own_formats_are_named(encoding: Any, tmp_path: Path) -> None:
    folder = write_tiny(KIND, tmp_path / "m", 1, encoding=encoding, num_hidden_layers=2, q_lora_rank=64)
    layer = "language_model.model.layers.1."
    values = "_packed" if encoding == "int4" else ""
    change(
        folder,
        "model",
        {
            layer + "self_attn.o_proj.weight_scale": torch.ones(128, 3),
            layer + "self_attn.q_a_proj.weight_scale": None,
            layer + "self_attn.q_b_proj.weight_scale": torch.ones(128, dtype=torch.int32),
            layer + "mlp.experts.gate_up_proj_scale": torch.ones(8, 127),
            layer + f"mlp.experts.down_proj{values}": torch.zeros(8, 128, 5, dtype=torch.uint8 if values else torch.int8),
        },
    )
    message = refusal(folder)
    assert (
        f"{LAYER}self_attn.o_proj.weight: its scale has shape [128, 3], which does not fit {encoding} of [128, 128]" in message
    )
    assert f"{LAYER}self_attn.q_a_proj.weight is stored as {encoding} and its scale is missing" in message
    assert f"{LAYER}self_attn.q_b_proj.weight: its scale has dtype I32" in message
    assert f"{LAYER}mlp.experts.gate_up_proj: its scale has shape [8, 127], which does not fit {encoding}" in message
    assert f"{LAYER}mlp.experts.down_proj has shape [8, 128, 5] instead of [8, 128, {32 if values else 64}]" in message


def test_experts_with_scales_of_their_own_halves(tmp_path: Path) -> None:
    """Native files scale w1 and w3 of an expert apart; the fused matrix keeps both, compressed and decoded."""
    folder = write_tiny(KIND, tmp_path / "m", 1, layout="native", encoding="fp8", num_hidden_layers=1)
    path = folder / "consolidated.safetensors"
    tensors = load_file(path)
    tensors["layers.0.experts.2.w3.qscale_weight"] *= 8
    save_file(tensors, path)
    shapes = shapes_of(read_config(folder))
    halves = [
        tensors[f"layers.0.experts.2.{name}.weight"].float() * tensors[f"layers.0.experts.2.{name}.qscale_weight"]
        for name in ("w1", "w3")
    ]
    with open_checkpoint(folder, shapes, torch.float32, torch.device("cpu")) as checkpoint:
        experts = checkpoint.experts("model.layers.0.mlp.experts.", slice(2, 3))
        decoded = checkpoint.take("model.layers.0.mlp.experts.gate_up_proj")[2]
    assert isinstance(experts, CompressedExperts)
    (gate_up,) = experts.gate_up
    assert isinstance(gate_up, Fp8Linear)
    assert torch.equal(gate_up.decoded(slice(None)), torch.cat(halves))
    assert torch.equal(decoded, torch.cat(halves))


def test_a_folder_with_both_copies_is_read_once(tmp_path: Path) -> None:
    native = write_tiny(KIND, tmp_path / "native", 1, layout="native", shards=2)
    assert layout_of_folder(native) == "native"
    both = write_tiny(KIND, tmp_path / "both", 1)
    for path in native.glob("consolidated*"):
        shutil.copy(path, both)
    shutil.copy(native / "params.json", both)
    assert layout_of_folder(both) == "hf"
    a_runner(both).close()
    (both / "model.safetensors").unlink()
    assert layout_of_folder(both) == "native"
    a_runner(both).close()
    (both / "consolidated.safetensors.index.json").unlink()  # the shards are found by their names then
    a_runner(both).close()
    for path in both.glob("consolidated*"):
        path.unlink()
    (both / "config.json").unlink()
    assert "has no weights" in refusal(both)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": None}, "dim: is missing"),
        ({"q_lora_rank": None}, "q_lora_rank: is missing"),
        ({"moe": 3}, "moe: expected an object"),
        ({"moe": {"num_experts": 8}}, "moe: expert_hidden_dim"),
        ({"kv_lora_rank": None}, "experts without kv_lora_rank"),
        ({"yarn": {"factor": 2.0, "original_max_position_embeddings": 32, "beta": 32, "alpha": 1}}, "apply_scale"),
        ({"yarn": {"factor": 2.0}}, "yarn: original_max_position_embeddings, beta, alpha"),
        ({"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 7}}, "differs from that of yarn"),
        ({"use_biases": True}, "attention_bias"),
        ({"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}}, "NO_SCALES"),
        ({"quantization": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, "pack-quantized"),
    ],
)
def test_what_params_cannot_say(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = write_tiny(KIND, tmp_path / "m", 1, layout="native", num_hidden_layers=1)
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(ModelError, match=named) as caught:
        read_config(folder)
    assert "params.json" in str(caught.value)


def test_a_damaged_params_file(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("[]")
    for read in (read_config, read_model_card):
        with pytest.raises(ModelError, match=r"params\.json"):
            read(tmp_path)
    with pytest.raises(ModelError, match="route_every_n"):
        config_from_params({**dict.fromkeys(COMMON, 4), "moe": {"route_every_n": 2}}, "params.json")


COMMON = (
    *("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "norm_eps"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)


def test_progress_reaches_the_bytes_of_all_tensors(tmp_path: Path) -> None:
    folder = write_tiny(KIND, tmp_path / "m", 1, layout="native", encoding="nvfp4", shards=2)
    seen: list[tuple[str, int, int]] = []
    config = read_config(folder)
    load_decoder(config, folder, torch.float32, torch.device("cpu"), lambda *event: seen.append(event))
    assert {(what, total) for what, _, total in seen} == {("weights", seen[-1][1])}
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})
