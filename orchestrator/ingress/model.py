"""The model as the front door knows it: its limits, its tokenizer, its chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.model_card import ModelCard
from orchestrator.ingress.chat import ChatTemplate, JinjaTemplate, PlainTemplate
from orchestrator.ingress.grammar import GrammarCheck
from orchestrator.ingress.text import TextRules
from orchestrator.ingress.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model of the cluster. Without a tokenizer only token ids go in and out."""

    name: str
    card: ModelCard
    tokenizer: Tokenizer | None
    chat: ChatTemplate | None
    grammars: GrammarCheck | None = None  # None: its tokens are not known as text, or nothing could end an output

    def text_rules(self, stops: tuple[str, ...], min_tokens: int) -> TextRules | None:
        """How output becomes text; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return TextRules(self.tokenizer.detokenizer, stops, min_tokens)


def load_served_model(name: str, card: ModelCard, model_dir: Path | None) -> ServedModel:
    """Loads tokenizer and template of a checkpoint folder; the oracle brings its own.

    Raises ModelError, naming the file, when one of them is unusable.
    """
    if card.architecture == "oracle":
        return ServedModel(name=name, card=card, tokenizer=ByteTokenizer(), chat=PlainTemplate())
    if model_dir is None or not card.has_tokenizer:
        return ServedModel(name=name, card=card, tokenizer=None, chat=None)
    chat = None
    if card.chat_template is not None:
        chat = JinjaTemplate(card.chat_template, _special_tokens(model_dir))
    grammars = GrammarCheck(model_dir, card.vocab_size, card.eos_token_ids) if card.eos_token_ids else None
    return ServedModel(name=name, card=card, tokenizer=load_tokenizer(model_dir), chat=chat, grammars=grammars)


def _special_tokens(model_dir: Path) -> dict[str, str]:
    """Names to texts of the special tokens. The file is optional, and the template is checked when it is used."""
    try:
        config: Any = json.loads((model_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found
