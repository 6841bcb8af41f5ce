"""Quantised copies: the tensors that `tiny` writes, everything else untouched, and what `inspect` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.native_params import Layout
from protos.contract.errors import ModelError
from tests.support.torch_models import a_runner
from workers.engines.torch.model_tool import main
from workers.engines.torch.quantise import TARGETS, quantise
from workers.engines.torch.tiny import write_tiny
from workers.engines.torch.tiny_files import LAYOUTS, Encoding

KIND = "mistral-small-4"
DIMS: dict[str, Any] = {"q_lora_rank": 64, "num_hidden_layers": 2}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("encoding", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_holds_what_tiny_writes_in_that_format(layout: Layout, encoding: Encoding, tmp_path: Path) -> None:
    source = write_tiny(KIND, tmp_path / "source", 3, layout=layout, shards=3, **DIMS)
    twin = stored(write_tiny(KIND, tmp_path / "twin", 3, layout=layout, encoding=encoding, **DIMS))
    seen: list[tuple[str, int, int]] = []
    copy = quantise(source, tmp_path / "copy", encoding, lambda *event: seen.append(event))
    found = stored(copy)
    assert found.keys() == {name for name in twin if not name.endswith(("activation_scale", "qscale_act"))}
    original = stored(source)
    for name, tensor in found.items():
        expected = original.get(name, twin[name]) if tensor.dtype == torch.float32 else twin[name]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(tensor.float(), expected.float()), name
    assert [path.name for path in sorted(copy.glob("*safetensors*"))] == [
        path.name for path in sorted(source.glob("*safetensors*"))
    ]
    assert (copy / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (seen[-1][0], seen[-1][1]) == ("quantise", seen[-1][2])
    a_runner(copy).close()


def test_a_quantised_source_is_decoded_first(tmp_path: Path) -> None:
    source = write_tiny(KIND, tmp_path / "source", 3, layout="native", encoding="nvfp4", shards=2, **DIMS)
    copy = quantise(source, tmp_path / "copy", "int8")
    dtypes = {tensor.dtype for tensor in stored(copy).values()}
    assert dtypes == {torch.int8, torch.bfloat16, torch.float32}
    a_runner(copy).close()
    again = quantise(copy, tmp_path / "again", "int8")  # what has the format is left alone
    assert all(torch.equal(tensor, stored(again)[name]) for name, tensor in stored(copy).items())


def test_image_tensors_stay_and_narrow_weights_are_left(tmp_path: Path) -> None:
    source = write_tiny(KIND, tmp_path / "source", 3, q_lora_rank=48, num_hidden_layers=1)
    image = {"vision_tower.patch_conv.weight": torch.ones(2, 3)}
    save_file({**stored(source), **image}, source / "model.safetensors")
    copy = stored(quantise(source, tmp_path / "copy", "int4"))
    assert torch.equal(copy["vision_tower.patch_conv.weight"], torch.ones(2, 3))
    prefix = "language_model.model.layers.0.self_attn."
    assert copy[prefix + "q_b_proj.weight"].dtype == torch.float32  # 48 columns
    assert copy[prefix + "q_a_proj.weight_packed"].dtype == torch.uint8
    a_runner(tmp_path / "copy").close()


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source", 3)
    with pytest.raises(ModelError, match="exists already"):
        quantise(source, source, "int8")
    save_file({**stored(source), "surplus": torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(ModelError, match="surplus is not part"):
        quantise(source, tmp_path / "copy", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_command_and_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = write_tiny(KIND, tmp_path / "source", 3, encoding="fp8", **DIMS)
    assert main(["quantise", str(source), str(tmp_path / "copy"), "--format", "int4", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["stage"] for line in lines[:-1]} == {"quantise"}
    assert lines[-1]["weights_bytes"] < lines[-1]["source_bytes"]

    assert main(["inspect", str(source), "--check", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["stage"] for line in lines[:-1]} == {"weights"}
    facts = lines[-1]
    assert facts["activation_scales"] == 2 * (5 + 2 + 3)  # per layer: attention, the fused experts, the shared expert
    by_format = facts["weights_by_format"]
    assert facts["weights"] == sorted(by_format) == ["bf16", "fp8"]
    assert by_format["fp8"]["tensors"] == 20
    latent_heads = 2 * 4 * (16 + 32) * 32  # values of kv_b_proj, decoded into bf16
    rows = 2 * ((64 + 4 * 32 + 48 + 128) + 8 * (128 + 128) + (64 + 64 + 128))  # those of all other fp8 weights
    values = by_format["fp8"]["disk_bytes"] - 4 * (2 * (5 + 8 + 8 + 3))  # without the scales
    assert by_format["fp8"]["memory_bytes"] == values + latent_heads + 4 * rows
    assert by_format["bf16"]["disk_bytes"] == by_format["bf16"]["memory_bytes"]
    assert facts["memory_bytes_bf16"] == sum(sums["memory_bytes"] for sums in by_format.values())


def test_check_names_what_is_not_finite(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = write_tiny(KIND, tmp_path / "m", 3, encoding="int8", layout="native", **DIMS)
    path = folder / "consolidated.safetensors"
    tensors = load_file(path)
    tensors["layers.1.experts.3.w2.weight_scale"][5] = float("nan")
    save_file(tensors, path)
    assert main(["inspect", str(folder)]) == 0
    assert main(["inspect", str(folder), "--check"]) == 2
    assert "not finite: model.layers.1.mlp.experts.down_proj;" in capsys.readouterr().err
