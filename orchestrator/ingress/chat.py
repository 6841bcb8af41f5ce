"""Messages to prompt tokens, by the template of the model's own folder. Clients never send templates."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orchestrator.ingress.clock import local_time
from orchestrator.ingress.tokenizer import Tokenizer
from protos.contract.errors import InvalidRequest, ModelError

_MAX_TEMPLATE_CHARS = 256 * 1024
_MAX_RENDER_S = 5.0


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


class ChatTemplate(Protocol):
    """Renders messages up to the point where the model answers."""

    def render(self, messages: Sequence[Message], max_chars: int) -> str:
        """Raises InvalidRequest for messages that the template refuses and for a text above `max_chars`."""
        ...


class PlainTemplate:
    """The oracle's: one `role: content` line for each message, then `assistant:`."""

    def render(self, messages: Sequence[Message], max_chars: int) -> str:
        """See ChatTemplate."""
        text = "".join(f"{message.role}: {message.content}\n" for message in messages) + "assistant:"
        if len(text) > max_chars:
            raise InvalidRequest(f"chat: the rendered prompt has more than {max_chars} characters; send less")
        return text


class JinjaTemplate:
    """A template file in a sandbox that can neither reach attributes of the process nor change what it is given."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ModelError when the template does not compile. `special_tokens`: bos_token, eos_token, ... by name."""
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise ModelError(f"chat template: {len(source)} characters, more than {_MAX_TEMPLATE_CHARS}; it is no template")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"chat template: {error}; restore the template of the checkpoint") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Message], max_chars: int) -> str:
        """See ChatTemplate. Gives up after five seconds."""
        started_s = time.monotonic()
        pieces: list[str] = []
        chars = 0
        try:
            for piece in self._template.generate(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=True,
                tools=None,
                **self._special_tokens,
            ):
                pieces.append(piece)
                chars += len(piece)
                if chars > max_chars:
                    raise InvalidRequest(f"chat: the rendered prompt has more than {max_chars} characters; send less")
                if time.monotonic() - started_s > _MAX_RENDER_S:
                    raise InvalidRequest(f"chat: rendering took more than {_MAX_RENDER_S:.0f} s; send fewer messages")
        except _RefusedByTemplate as error:
            raise InvalidRequest(f"chat: the model's template refuses these messages: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise InvalidRequest(f"chat: the model's template cannot render these messages ({type(error).__name__})") from error
        return "".join(pieces)


def encode_chat(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], max_chars: int) -> list[int]:
    """Prompt tokens of a chat.

    What a message spells stays text: only the template writes special tokens. A special token's text inside a message is
    swapped for a mark that nobody can guess while the template runs, and encoded as ordinary text afterwards.
    """
    mark = f"\ue000{secrets.token_hex(8)}"
    swapped: list[str] = []

    def shield(content: str) -> str:
        for special in tokenizer.special_texts:
            if special in content:
                swapped.append(special)
                content = content.replace(special, f"{mark}{len(swapped) - 1:08d}\ue001")
        return content

    rendered = template.render([Message(m.role, shield(m.content)) for m in messages], max_chars)
    if not swapped:
        return tokenizer.encode(rendered, special_tokens=True, add_special_tokens=False)
    ids: list[int] = []
    for position, part in enumerate(re.split(f"{mark}([0-9]{{8}})\ue001", rendered)):
        is_mark = position % 2 == 1  # the group of re.split
        text = swapped[int(part)] if is_mark else part
        ids += tokenizer.encode(text, special_tokens=not is_mark, add_special_tokens=False)
    return ids


class _RefusedByTemplate(Exception):
    """The template called raise_exception."""


def _refuse(message: str) -> NoReturn:
    raise _RefusedByTemplate(str(message)[:200])


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(pattern: str) -> str:
    return local_time().strftime(pattern)
