"""Grammars ready to match, kept as long as they are used."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from protos.contract.errors import InvalidRequest
from protos.contract.grammar import JSON_SPACE, PARSER_LIMITS, Grammar, GrammarKind, check_grammar_size, one_line
from workers.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT = 64
LIMITS: dict[str, Any] = dict(PARSER_LIMITS)


class CompiledGrammars:
    """The least recently used grammar goes first. Safe to use from several threads; `load` is called once."""

    def __init__(self, load: Vocabulary, max_kept: int = MAX_KEPT) -> None:
        self._load = load
        self._max_kept = max_kept
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._kept: OrderedDict[bytes, LLMatcher] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def vocabulary(self) -> LLTokenizer:
        """The tokens. Raises ModelError."""
        with self._loading:
            if self._tokens is None:
                self._tokens = self._load()
            return self._tokens

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A fresh matcher, at the beginning. Raises InvalidRequest that says what is wrong with the grammar, and where."""
        digest = hashlib.sha256(f"{grammar.kind}\0{grammar.text}".encode()).digest()
        with self._lock:
            compiled = self._kept.get(digest)
            if compiled is not None:
                self._kept.move_to_end(digest)
                return compiled.deep_copy()
        compiled = compile_grammar(grammar, self.vocabulary())
        with self._lock:
            self._kept[digest] = compiled
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
            return compiled.deep_copy()


def compile_grammar(grammar: Grammar, tokens: LLTokenizer) -> LLMatcher:
    """Compiles under PARSER_LIMITS. Call it on a `deep_executor` thread. Raises InvalidRequest."""
    from llguidance import LLMatcher, LLParserLimits

    where = f"grammar.{grammar.kind}"
    check_grammar_size(grammar, where)
    try:
        match grammar.kind:
            case GrammarKind.JSON_SCHEMA:
                source = LLMatcher.grammar_from_json_schema(grammar.text, {"whitespace_pattern": JSON_SPACE})
            case GrammarKind.REGEX:
                source = LLMatcher.grammar_from_regex(grammar.text)
            case GrammarKind.LARK:
                source = LLMatcher.grammar_from_lark(grammar.text)
        matcher = LLMatcher(tokens, source, log_level=0, limits=LLParserLimits(verbose_errors=False, **LIMITS))
    except ValueError as error:
        raise InvalidRequest(f"{where}: {one_line(str(error))}") from error
    if matcher.is_error():
        raise InvalidRequest(f"{where}: {one_line(matcher.get_error())}")
    return matcher
