"""Text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from orchestrator.ingress.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from protos.contract.errors import ModelError

_BYTE_OFFSET = 3  # oracle ids: 0 pad, 1 bos, 2 eos, 3 + b for byte b


class Tokenizer(Protocol):
    """The vocabulary of one model. Safe to use from several threads."""

    @property
    def max_token_bytes(self) -> int:
        """No token stands for more bytes of text: `len(text) / max_token_bytes` tokens at least."""
        ...

    @property
    def special_texts(self) -> Sequence[str]:
        """The texts that stand for special tokens; longest first."""
        ...

    def encode(self, text: str, *, special_tokens: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        A text that spells a special token is ordinary text unless `special_tokens`; `add_special_tokens` puts those around
        it that the model wants around every text.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole sequence; special tokens show nothing, unknown ids neither."""
        ...

    def detokenizer(self) -> Detokenizer:
        """A fresh detokenizer for one sequence."""
        ...


class ByteTokenizer:
    """The oracle's: one token for each byte of UTF-8."""

    max_token_bytes = 1
    special_texts: Sequence[str] = ()
    _bytes_of: Mapping[int, bytes] = {byte + _BYTE_OFFSET: bytes([byte]) for byte in range(256)}

    def encode(self, text: str, *, special_tokens: bool = False, add_special_tokens: bool = True) -> list[int]:
        """See Tokenizer; there are no special texts and nothing is added."""
        return [byte + _BYTE_OFFSET for byte in text.encode()]

    def decode(self, token_ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return b"".join(self._bytes_of.get(token_id, b"") for token_id in token_ids).decode("utf-8", "replace")

    def detokenizer(self) -> Detokenizer:
        """See Tokenizer."""
        return ByteDetokenizer(self._bytes_of)


class FileTokenizer:
    """A `tokenizer.json` under the `tokenizers` library."""

    def __init__(self, definition: str) -> None:
        """Raises ValueError when the definition is none."""
        from tokenizers import Tokenizer as Library

        # Two instances because the switch is a property of the instance, and both kinds run at the same time.
        self._as_special: Any = _library(Library, definition)
        self._as_text: Any = _library(Library, definition)
        self._as_text.encode_special_tokens = True
        self._special = _special_tokens(definition)
        self.special_texts: Sequence[str] = sorted(self._special.values(), key=len, reverse=True)
        vocabulary: dict[str, int] = self._as_special.get_vocab(with_added_tokens=True)
        self.max_token_bytes = max((len(token.encode()) for token in vocabulary), default=1)
        self._bytes_of: dict[int, bytes] | None = None
        if _is_byte_level(definition):
            self._bytes_of = {i: _byte_level_bytes(t) for t, i in vocabulary.items() if i not in self._special}

    def encode(self, text: str, *, special_tokens: bool = False, add_special_tokens: bool = True) -> list[int]:
        """See Tokenizer."""
        library = self._as_special if special_tokens else self._as_text
        ids: list[int] = library.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._as_special.decode([i for i in token_ids if i not in self._special], skip_special_tokens=False)
        return text

    def detokenizer(self) -> Detokenizer:
        """See Tokenizer."""
        if self._bytes_of is not None:
            return ByteDetokenizer(self._bytes_of)
        return WindowDetokenizer(self.decode, self._special.__contains__)


def load_tokenizer(model_dir: Path) -> FileTokenizer:
    """The tokenizer of a checkpoint folder. Raises ModelError, naming the file, when it is missing or unusable."""
    path = model_dir / "tokenizer.json"
    try:
        return FileTokenizer(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); copy the whole checkpoint folder") from error
    except ValueError as error:
        raise ModelError(f"{path}: is no tokenizer definition ({error}); restore the file") from error


def _library(library: Any, definition: str) -> Any:
    try:
        loaded = library.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)[:200]) from error
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _special_tokens(definition: str) -> dict[int, str]:
    added = json.loads(definition).get("added_tokens") or []
    return {token["id"]: token["content"] for token in added if token.get("special")}


def _is_byte_level(definition: str) -> bool:
    decoder = json.loads(definition).get("decoder") or {}
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or []
        return len(parts) == 1 and parts[0].get("type") == "ByteLevel"
    return bool(decoder.get("type") == "ByteLevel")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: printable Latin-1 bytes stand for themselves, the rest follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + n): byte for n, byte in enumerate(hidden)})
    return alphabet


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    # A token with a character outside the alphabet is an added one, and stands for its own text.
    if all(char in _ALPHABET for char in token):
        return bytes(_ALPHABET[char] for char in token)
    return token.encode()
