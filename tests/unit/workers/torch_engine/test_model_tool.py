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
