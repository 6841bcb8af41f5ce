from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from protos.contract.errors import ModelError
from tests.support.torch_models import a_runner, feed, random_tokens
from workers.engines.torch.weights import shard_paths, weights_digest


@pytest.fixture
def copied(tiny_mistral4: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_mistral4, tmp_path / "copy"))


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces, adds or (None) drops tensors."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def split_in_two(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_every_tensor_at_fault_is_named(copied: Path) -> None:
    layer = "language_model.model.layers.1."
    rewrite(
        copied,
        {
            layer + "mlp.gate.weight": None,
            layer + "self_attn.o_proj.weight": torch.zeros(3, 4),
            "language_model.model.norm.weight": torch.zeros(128, dtype=torch.int32),
            "language_model.model.surplus": torch.zeros(1),
        },
    )
    with pytest.raises(ModelError) as caught:
        a_runner(copied)
    message = str(caught.value)
    assert "model.layers.1.mlp.gate.weight is missing" in message
    assert "model.layers.1.self_attn.o_proj.weight has shape [3, 4] instead of [128, 128]" in message
    assert "model.norm.weight has dtype I32" in message
    assert "model.surplus is not part of the model" in message


def test_image_encoder_and_old_buffers_are_passed_over(copied: Path) -> None:
    rewrite(
        copied,
        {
            "vision_tower.patch_conv.weight": torch.zeros(2),
            "multi_modal_projector.norm.weight": torch.zeros(2),
            "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
        },
    )
    a_runner(copied).close()


def test_shards_load_like_one_file(copied: Path, tiny_mistral4: Path) -> None:
    split_in_two(copied)
    tokens = random_tokens(0, 20)
    one, two = (feed(a_runner(folder), tokens, [7], (3, 1)) for folder in (tiny_mistral4, copied))
    assert one == two
    assert [path.name for path in shard_paths(copied)] == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("index", "named"),
    [
        (b"{", "index"),
        (b"{}", "index"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: missing"),
        (b'{"weight_map": {"a": "../model.safetensors"}}', "no file name"),
        (b'{"weight_map": {"a": 1}}', "no file name"),
    ],
)
def test_a_damaged_index(copied: Path, index: bytes, named: str) -> None:
    (copied / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(ModelError, match=named):
        shard_paths(copied)


def test_a_truncated_file_and_a_missing_one(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: is no readable"):
        a_runner(copied)
    path.unlink()
    with pytest.raises(ModelError, match="has no weights"):
        a_runner(copied)


def test_a_tied_head_may_be_stored_again_but_not_differ(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "tied"))
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"lm_head\.weight differs"):
        a_runner(folder)
    rewrite(folder, {"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()})
    a_runner(folder).close()


def test_digest_follows_content_not_place(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "moved"))
    assert weights_digest(folder) == weights_digest(tiny_llama)
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert weights_digest(folder) != weights_digest(tiny_llama)
