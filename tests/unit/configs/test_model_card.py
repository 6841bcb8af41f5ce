"""Model cards are read from the small files of a checkpoint; what is wrong with them is named with its path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.model_card import card_of, oracle_card, read_model_card
from configs.schema.pools import ModelConfig
from protos.contract.errors import ModelError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def checkpoint(folder: Path, config: Any = LLAMA, **files: str) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_llama_folder(tmp_path: Path) -> None:
    card = read_model_card(checkpoint(tmp_path, tokenizer__json="{}", chat_template__jinja="{{ messages }}"))
    assert (card.architecture, card.vocab_size, card.context_tokens, card.num_layers) == ("llama", 100, 2048, 3)
    assert (card.bos_token_id, card.eos_token_ids) == (1, (2,))
    assert (card.has_tokenizer, card.has_chat_template, card.chat_template) == (True, True, "{{ messages }}")
    assert len(card.tokenizer_digest) == 32


def test_mistral_small_4_in_its_wrapper(tmp_path: Path) -> None:
    text = {**LLAMA, "model_type": "mistral4", "max_position_embeddings": 1_048_576}
    del text["eos_token_id"]
    card = read_model_card(checkpoint(tmp_path, {"model_type": "mistral3", "text_config": text, "eos_token_id": [2, 7]}))
    assert (card.architecture, card.context_tokens, card.eos_token_ids) == ("mistral4", 262_144, (2, 7))
    assert (card.has_tokenizer, card.tokenizer_digest, card.chat_template) == (False, "", None)


def test_a_bare_mistral4_with_a_short_context_keeps_it(tmp_path: Path) -> None:
    assert read_model_card(checkpoint(tmp_path, {**LLAMA, "model_type": "mistral4"})).context_tokens == 2048


def test_generation_config_wins_for_eos(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, generation_config__json='{"eos_token_id": [5, 2, 5]}')
    assert read_model_card(folder).eos_token_ids == (5, 2)


@pytest.mark.parametrize(
    ("tokenizer_config", "template"),
    [
        ('{"chat_template": "T"}', "T"),
        ('{"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]}', "D"),
        ("{}", None),
    ],
)
def test_templates_in_the_tokenizer_config(tmp_path: Path, tokenizer_config: str, template: str | None) -> None:
    assert read_model_card(checkpoint(tmp_path, tokenizer_config__json=tokenizer_config)).chat_template == template


def test_each_digest_changes_with_what_it_covers(tmp_path: Path) -> None:
    tokenizers, templates = set(), set()
    for tokenizer, template in [("{}", "a"), ("{}", "b"), ("{}a", ""), ("{ }", "a")]:
        folder = checkpoint(tmp_path, tokenizer__json=tokenizer, chat_template__jinja=template)
        card = read_model_card(folder)
        tokenizers.add(card.tokenizer_digest)
        templates.add(card.template_digest)
    assert (len(tokenizers), len(templates)) == (3, 3)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON"),
        ("[]", "holds no JSON object"),
        ({**LLAMA, "model_type": "gpt2"}, "'gpt2' is not served; one of llama, ministral, ministral3, mistral, mistral4 is"),
        ({**LLAMA, "model_type": ["llama"]}, "is not served"),
        ({**LLAMA, "vocab_size": None}, "vocab_size is missing; an integer of at least 1 is needed"),
        ({**LLAMA, "vocab_size": "100"}, "vocab_size is '100'"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers is True"),
        ({**LLAMA, "max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({**LLAMA, "eos_token_id": 100}, "eos_token_id 100 is no token id below 100"),
        ({**LLAMA, "eos_token_id": [2, -1]}, "eos_token_id -1 is no token id below 100"),
        ({**LLAMA, "bos_token_id": "1"}, "bos_token_id '1' is no token id below 100"),
        ({"model_type": "mistral3"}, "text_config is missing"),
    ],
)
def test_damaged_configs(tmp_path: Path, config: Any, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_model_card(checkpoint(tmp_path, config))
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert said in str(caught.value)


def test_missing_things(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent: no such folder; give the folder that holds config\.json"):
        read_model_card(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"config\.json: missing; copy the whole checkpoint folder"):
        read_model_card(tmp_path)
    checkpoint(tmp_path, tokenizer_config__json='{"chat_template": 3}')
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: chat_template is neither text nor"):
        read_model_card(tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ModelError, match=r"config\.json: is no UTF-8 text"):
        read_model_card(tmp_path)


def test_the_configured_context_lowers_and_never_raises(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    assert card_of(ModelConfig(name="m", source="x", context_tokens=512), tmp_path).context_tokens == 512
    assert card_of(ModelConfig(name="m", source="x"), tmp_path).context_tokens == 2048
    with pytest.raises(ModelError, match="context_tokens 4096 is above the 2048"):
        card_of(ModelConfig(name="m", source="x", context_tokens=4096), tmp_path)
    with pytest.raises(ModelError, match="has no folder yet"):
        card_of(ModelConfig(name="m", source="demo"), None)


def test_the_oracle_needs_no_files() -> None:
    card = card_of(ModelConfig(name="o", source="oracle"), None)
    assert card == oracle_card()
    assert (card.vocab_size, card.context_tokens, card.eos_token_ids, card.bos_token_id) == (259, 262_144, (2,), 1)
