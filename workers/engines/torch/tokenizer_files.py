"""Writing tokenizer.json and its companions through the tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_NAMED = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 11: "<pad>"}
_TINY_TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}</s>"
    "{% else %}[INST]{{ message['content'] }}[/INST]{% endif %}{% endfor %}"
)


def write_json(path: Path, content: object) -> None:
    """Writes JSON with a final line break; equal content gives equal bytes."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def byte_level_bpe(tokens: Sequence[str], merges: Sequence[tuple[str, str]], special_ids: Sequence[int]) -> Tokenizer:
    """Byte-level BPE that splits digits one by one and adds no space in front. Token id = place in `tokens`."""
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[index], special=True, normalized=False) for index in special_ids])
    return tokenizer


def byte_tokenizer_files(vocab_size: int, num_special: int) -> dict[str, Any]:
    """Files of a tokenizer without merges: special tokens, one token per byte, filler up to `vocab_size`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [_NAMED.get(index, f"<special_{index}>") for index in range(num_special)] + alphabet
    special_ids = list(range(num_special))
    special_ids += range(len(tokens), vocab_size)
    tokens += [f"<filler_{index}>" for index in range(len(tokens), vocab_size)]
    tokenizer = byte_level_bpe(tokens, [], special_ids)
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "chat_template": _TINY_TEMPLATE,
        },
    }
