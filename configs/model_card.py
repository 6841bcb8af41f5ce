"""What a front end must know of a checkpoint, read from its small files with the standard library alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.native_params import NATIVE_PARAMS, config_from_params, layout_of_folder
from configs.schema.pools import ModelConfig
from protos.contract.errors import ModelError

ARCHITECTURES = frozenset({"llama", "mistral", "ministral", "ministral3", "mistral4"})
MISTRAL4_CONTEXT_TOKENS = 262_144  # supported and advertised; config.json allows a million positions
ORACLE_VOCAB_SIZE = 259  # pad, bos, eos and the 256 bytes
ORACLE_CONTEXT_TOKENS = 262_144
_MAX_JSON_BYTES = 64 * 1024 * 1024
_MAX_TOKENIZER_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The facts of one checkpoint. The digests cover tokenizer.json and the chat template; empty without them."""

    architecture: str
    vocab_size: int
    context_tokens: int
    num_layers: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    has_tokenizer: bool = False
    chat_template: str | None = None
    tokenizer_digest: str = ""
    template_digest: str = ""
    has_logits: bool = True  # False: penalties, logit_bias and logprobs are refused

    @property
    def has_chat_template(self) -> bool:
        """True when messages can be rendered."""
        return self.chat_template is not None


def oracle_card() -> ModelCard:
    """The arithmetic model: ids 0 pad, 1 bos, 2 eos, 3 + b for byte b; no template, so text is its bytes."""
    return ModelCard(
        architecture="oracle",
        vocab_size=ORACLE_VOCAB_SIZE,
        context_tokens=ORACLE_CONTEXT_TOKENS,
        num_layers=1,
        eos_token_ids=(2,),
        bos_token_id=1,
        tokenizer_digest="oracle-bytes",
        has_logits=False,
    )


def card_of(model: ModelConfig, model_dir: Path | None) -> ModelCard:
    """The card of a configured model; `context_tokens` of the file lowers the checkpoint's own and never raises it.

    Raises ModelError, naming the path and what to do, when the checkpoint cannot be read.
    """
    if model.source == "oracle":
        card = oracle_card()
    elif model_dir is None:
        raise ModelError(f"model {model.name}: source {model.source!r} has no folder yet; import it with `autan model import`")
    else:
        card = read_model_card(model_dir)
    if model.context_tokens is None or model.context_tokens == card.context_tokens:
        return card
    if model.context_tokens > card.context_tokens:
        raise ModelError(
            f"model {model.name}: context_tokens {model.context_tokens} is above the {card.context_tokens} "
            f"that {model_dir or model.source} supports; lower it"
        )
    fields = {name: getattr(card, name) for name in ModelCard.__dataclass_fields__}
    return ModelCard(**{**fields, "context_tokens": model.context_tokens})


def read_model_card(model_dir: Path) -> ModelCard:
    """Reads config.json (or params.json), generation_config.json, tokenizer.json and the chat template of a folder.

    Raises ModelError, naming the path and what to do, for a missing or malformed file and for an unknown architecture.
    """
    path, outer = _read_outer_config(model_dir)
    architecture, text = _text_config(path, outer)
    context_tokens = _integer(path, text, "max_position_embeddings", 16)
    if architecture == "mistral4":
        context_tokens = min(context_tokens, MISTRAL4_CONTEXT_TOKENS)
    vocab_size = _integer(path, text, "vocab_size", 1)
    has_tokenizer = (model_dir / "tokenizer.json").is_file()
    template = _chat_template(model_dir)
    return ModelCard(
        architecture=architecture,
        vocab_size=vocab_size,
        context_tokens=context_tokens,
        num_layers=_integer(path, text, "num_hidden_layers", 1),
        eos_token_ids=_eos_token_ids(path, outer, text, vocab_size),
        bos_token_id=_optional_id(path, text if text.get("bos_token_id") is not None else outer, "bos_token_id", vocab_size),
        has_tokenizer=has_tokenizer,
        chat_template=template,
        tokenizer_digest=_tokenizer_digest(model_dir) if has_tokenizer else "",
        template_digest="" if template is None else hashlib.blake2b(template.encode(), digest_size=16).hexdigest(),
    )


def read_text_config(model_dir: Path) -> tuple[str, Mapping[str, Any]]:
    """The architecture and the section of its decoder, in the words of config.json. Raises ModelError as read_model_card."""
    return _text_config(*_read_outer_config(model_dir))


def _read_outer_config(model_dir: Path) -> tuple[Path, Mapping[str, Any]]:
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: no such folder; give the folder that holds config.json and the weights")
    if layout_of_folder(model_dir) == "native":
        path = model_dir / NATIVE_PARAMS
        return path, config_from_params(_read_json(path), str(path))
    path = model_dir / "config.json"
    return path, _read_json(path)


def _text_config(path: Path, outer: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    kind: object = outer.get("model_type")
    text: object = outer
    if kind == "mistral3":
        text = outer.get("text_config")
        if not isinstance(text, dict):
            raise ModelError(f"{path}: text_config is missing; a mistral3 checkpoint describes its decoder there")
        kind = text.get("model_type")
    if not isinstance(text, dict) or not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ModelError(f"{path}: model_type {kind!r} is not served; one of {', '.join(sorted(ARCHITECTURES))} is")
    return kind, text


def _eos_token_ids(config: Path, outer: Mapping[str, Any], text: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    generation = config.parent / "generation_config.json"
    sources = [(config, text), (config, outer)]
    if generation.is_file():
        sources.insert(0, (generation, _read_json(generation)))
    for path, values in sources:
        found = values.get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            for token_id in ids:
                _check_id(path, "eos_token_id", token_id, vocab_size)
            return tuple(dict.fromkeys(ids))
    return ()


def _optional_id(path: Path, values: Mapping[str, Any], key: str, vocab_size: int) -> int | None:
    found: int | None = values.get(key)
    if found is not None:
        _check_id(path, key, found, vocab_size)
    return found


def _check_id(path: Path, key: str, value: object, vocab_size: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        raise ModelError(f"{path}: {key} {value!r} is no token id below {vocab_size}; the file is damaged or of another model")


def _integer(path: Path, values: Mapping[str, Any], key: str, minimum: int) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        said = "is missing" if value is None else f"is {value!r}"
        raise ModelError(f"{path}: {key} {said}; an integer of at least {minimum} is needed")
    return value


def _chat_template(model_dir: Path) -> str | None:
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return _text(path, _read_bytes(path, _MAX_JSON_BYTES))
    path = model_dir / "tokenizer_config.json"
    if not path.is_file():
        return None
    found = _read_json(path).get("chat_template")
    if isinstance(found, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ModelError(f"{path}: chat_template is neither text nor a list of named templates; restore the file")
    return found


def _tokenizer_digest(model_dir: Path) -> str:
    tokenizer = _read_bytes(model_dir / "tokenizer.json", _MAX_TOKENIZER_BYTES)
    return hashlib.blake2b(tokenizer, digest_size=16).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path, _read_bytes(path, _MAX_JSON_BYTES)))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is no valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no JSON object; restore the file")
    return value


def _text(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: is no UTF-8 text (byte {error.start}); restore the file") from error


def _read_bytes(path: Path, limit_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(limit_bytes + 1)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: missing; copy the whole checkpoint folder, or import the model again") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if len(raw) > limit_bytes:
        raise ModelError(f"{path}: is larger than {limit_bytes} bytes; it is not what its name says")
    return raw
