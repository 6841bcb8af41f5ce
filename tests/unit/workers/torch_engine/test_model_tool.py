from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from workers.engines.torch.model_tool import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the JSON lines."""
    code = main([*arguments, "--json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_tiny_then_inspect(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "tiny")
    code, lines = run(capsys, "tiny", "mistral-small-4", folder, "--seed", "3", "--set", "num_hidden_layers=2")
    assert (code, lines) == (0, [{"event": "done", "path": folder}])
    code, lines = run(capsys, "inspect", folder)
    assert code == 0
    facts = lines[-1]
    assert (facts["architecture"], facts["kv_layout"], facts["kv_values_per_token"]) == ("mistral4", "mla:latent+rope", 96)
    assert facts["parameters"] == 596_768
    assert facts["has_tokenizer"]
    assert main(["inspect", folder]) == 0
    assert "architecture: mistral4" in capsys.readouterr().out


def test_inspect_counts_the_published_dimensions(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, "inspect", "mistral-small-4")
    facts = lines[-1]
    assert (code, facts["parameters"], facts["text_parameters"]) == (0, 119_401_298_944, 118_972_826_624)
    assert facts["parameters_by_block"] == {
        "embeddings": 536_870_912,
        "norms": 299_008,
        "lm_head": 536_870_912,
        "attention": 1_009_824_768,
        "router": 18_874_368,
        "routed_experts": 115_964_116_992,
        "shared_experts": 905_969_664,
        "vision": 403_305_472,
        "projector": 25_166_848,
    }
    assert facts["kv_bytes_per_token_bf16"] == 23_040
    sizes = {name: round(size / 1e9, 2) for name, size in facts["bytes_by_format"].items()}
    assert (sizes["bf16"], sizes["fp8"], sizes["nvfp4"]) == (238.80, 120.92, 70.80)
    assert run(capsys, "inspect", "mistral-small-5")[0] == 2


@pytest.mark.parametrize("encoding", ["fp8", "nvfp4", "int8", "int4"])
def test_inspect_of_every_format_and_of_a_configuration_alone(
    encoding: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    made = ("--layout", "native", "--format", encoding, "--shards", "2", "--set", "q_lora_rank=64")
    assert run(capsys, "tiny", "mistral-small-4", str(folder), *made)[0] == 0
    facts = run(capsys, "inspect", str(folder))[1][-1]
    assert (facts["layout"], facts["weights"]) == ("native", sorted(["bf16", encoding]))
    # Headers and the scales of whole tensors come on top of what is predicted; int4 has groups of 32 where 64 do not fit.
    data = facts["weights_bytes"] - sum(header_bytes(path) for path in folder.glob("*.safetensors"))
    predicted = facts["bytes_by_format"][encoding]
    assert predicted <= data <= predicted * 1.04
    for path in folder.glob("consolidated*"):
        path.unlink()
    alone = run(capsys, "inspect", str(folder))[1][-1]
    assert (alone["weights"], alone["parameters"]) == ("none", facts["parameters"])


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_an_unusable_model_is_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_llama: Path) -> None:
    code, lines = run(capsys, "inspect", str(tmp_path))
    assert (code, lines[-1]["event"], lines[-1]["reason"]) == (2, "error", "MODEL_ERROR")
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"\0" * 20)
    assert run(capsys, "inspect", str(broken))[0] == 2
    assert run(capsys, "tiny", "llama", str(broken))[0] == 2
    assert run(capsys, "tiny", "llama", str(tmp_path / "x"), "--set", "head_dim=wide")[0] == 2
    assert main(["tiny", "llama", str(tmp_path / "x"), "--set", "depth=2"]) == 2
    assert "unknown depth" in capsys.readouterr().err


def test_bad_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["tiny", "gpt2", "x"], ["inspect"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err
