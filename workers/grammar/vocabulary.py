"""The tokens of a checkpoint as llguidance wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from protos.contract.errors import ModelError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

Vocabulary = Callable[[], "LLTokenizer"]
"""Loads the tokens of one model; slow (up to seconds). Raises ModelError. One such function for each kind of tokenizer."""


def vocabulary_of(model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Vocabulary | None:
    """How to load the tokens of a checkpoint folder; None when they are not known as text or nothing could end an output."""
    path = model_dir / "tokenizer.json"
    if not eos_token_ids or not path.is_file():
        return None
    return lambda: from_tokenizer_json(path, vocab_size, eos_token_ids)


def from_tokenizer_json(path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """A tokenizer.json. Special tokens are no text: a grammar reaches them by name only. Raises ModelError."""
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer

    try:
        definition = Tokenizer.from_file(str(path))
        definition.no_padding()
        definition.no_truncation()
        known = int(definition.get_vocab_size(with_added_tokens=True))
        return LLTokenizer(definition.to_str(), n_vocab=max(vocab_size, known), eos_token=list(eos_token_ids))
    except Exception as error:  # both libraries raise bare exceptions
        raise ModelError(f"{path}: is no tokenizer that grammars can use ({error})") from error
