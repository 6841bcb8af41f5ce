"""Typed reads from one JSON object of a checkpoint's configuration; every refusal names file and key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from protos.contract.errors import ModelError

_NO_DEFAULT: Final = object()


class ConfigSection:
    """One JSON object with its place in the file. All reads raise ModelError with the key path."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def error(self, key: str, problem: str) -> ModelError:
        """The refusal of one key."""
        return ModelError(f"{self._where}: {key}: {problem}")

    def has(self, key: str) -> bool:
        """True when the key is there and not null."""
        return self._values.get(key) is not None

    def is_null(self, key: str) -> bool:
        """True when the key is there and null."""
        return key in self._values and self._values[key] is None

    def refuse_unless(self, key: str, supported: object, hint: str = "") -> None:
        """Raises when the key is there with a value other than the one supported; null counts as absent."""
        value = self._values.get(key)
        if value is not None and value != supported:
            shown = "an object" if isinstance(value, Mapping) else repr(value)
            raise self.error(key, f"{shown} is not supported; {hint or f'only {supported!r} is'}")

    def section(self, key: str) -> ConfigSection:
        """A nested object."""
        value = self._required(key)
        if not isinstance(value, Mapping):
            raise self.error(key, f"expected an object, found {type(value).__name__}")
        return ConfigSection(value, f"{self._where}: {key}")

    def text(self, key: str, default: object = _NO_DEFAULT) -> str:
        """A string."""
        value = self._required(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, found {value!r}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self._required(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, f"expected a list of strings, found {value!r}")
        return list(value)

    def integer(self, key: str) -> int:
        """A positive integer."""
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, f"expected a positive integer, found {value!r}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """An integer from 0, or None when absent or null."""
        if not self.has(key):
            return None
        value = self._values[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, f"expected an integer from 0, found {value!r}")
        return value

    def number(self, key: str, default: object = _NO_DEFAULT) -> float:
        """A finite number."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, f"expected a finite number, found {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {value!r}")
        return value

    def _required(self, key: str, default: object = _NO_DEFAULT) -> object:
        if self.has(key):
            return self._values[key]
        if default is _NO_DEFAULT:
            raise self.error(key, "is missing")
        return default
