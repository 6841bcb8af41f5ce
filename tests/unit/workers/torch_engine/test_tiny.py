from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from configs.model_card import read_model_card
from protos.contract.errors import ModelError
from tests.support.torch_models import a_runner, tensors_of
from workers.engines.torch.tiny import KINDS, write_tiny

TEXTS = ["", "a", "Hello, world 123", "naïve café — 日本語 🎉\n\ttabs", "\x00\x7f", "[INST]"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_and_has_a_card(kind: str, tmp_path: Path) -> None:
    folder = write_tiny(kind, tmp_path / "made" / kind, 4, num_hidden_layers=2, vocab_size=300)
    card = read_model_card(folder)
    assert (card.vocab_size, card.num_layers, card.eos_token_ids, card.has_tokenizer) == (300, 2, (2,), True)
    assert card.has_chat_template
    assert a_runner(folder).layout.num_layers == 2
    assert [path.name for path in folder.parent.iterdir()] == [kind]


def test_mistral_small_4_has_the_published_names_and_no_image_encoder(tmp_path: Path) -> None:
    from safetensors import safe_open

    folder = write_tiny("mistral-small-4", tmp_path / "m", 4, num_hidden_layers=1, first_k_dense_replace=0)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    layer = "language_model.model.layers.0."
    attention = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    assert names == {
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        layer + "input_layernorm.weight",
        layer + "post_attention_layernorm.weight",
        layer + "mlp.gate.weight",
        layer + "mlp.experts.gate_up_proj",
        layer + "mlp.experts.down_proj",
        *(f"{layer}self_attn.{name}.weight" for name in attention),
        *(f"{layer}mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
    }


def test_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    one, two, other = (write_tiny("llama", tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()
    assert not tensors_of(one)["lm_head.weight"].equal(tensors_of(other)["lm_head.weight"])


def test_text_goes_round_through_the_byte_tokenizer(tiny_mistral4: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_mistral4 / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 272
    for text in TEXTS[:-1]:
        ids = tokenizer.encode(text).ids
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode(TEXTS[-1]).ids == [3]


def test_refusals(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, object], str]] = [
        ("gpt2", {}, "no tiny model"),
        ("llama", {"layers": 2}, "unknown layers"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("mistral-small-4", {"vocab_size": 100}, "vocab_size"),
    ]
    for kind, dims, named in cases:
        with pytest.raises(ModelError, match=named):
            write_tiny(kind, tmp_path / "refused", 0, **dims)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        write_tiny("llama", tmp_path / "there", 0)
