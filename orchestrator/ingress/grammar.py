"""Grammars at the door: what the client sent, and whether the workers will be able to compile it."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.contract.errors import AutanError, InvalidRequest, ModelError, UnavailableError
from protos.contract.grammar import (
    ANY_OBJECT,
    JSON_SPACE,
    PARSER_LIMITS,
    Grammar,
    GrammarKind,
    check_grammar_size,
    deep_executor,
    one_line,
)
from protos.wire import common, inference

if TYPE_CHECKING:
    from llguidance import LLTokenizer

PATIENCE_S = 5.0  # an ordinary grammar compiles in milliseconds
_MAX_KNOWN = 1024
_LIMITS: dict[str, Any] = dict(PARSER_LIMITS)


def read_grammar(params: inference.SamplingParams) -> Grammar | None:
    """The grammar of a request, not compiled yet; None for free text. Raises InvalidRequest."""
    if not params.HasField("grammar"):
        return None
    sent = params.grammar
    match sent.WhichOneof("kind"):
        case None:
            raise InvalidRequest("sampling.grammar: it is empty; set one of json_schema, regex, lark and json_object")
        case "json_object":
            if not sent.json_object:
                raise InvalidRequest("sampling.grammar.json_object: false asks for nothing; leave the grammar out")
            grammar = Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT)
        case kind:
            grammar = Grammar(GrammarKind(kind), getattr(sent, kind))
    check_grammar_size(grammar, f"sampling.grammar.{grammar.kind}")
    if params.ignore_eos:
        raise InvalidRequest("sampling.ignore_eos: with a grammar the output could not end; leave one of them out")
    return grammar


def to_wire(grammar: Grammar | None) -> common.Grammar | None:
    """The grammar as the stored spec has it."""
    if grammar is None:
        return None
    message = common.Grammar()
    setattr(message, grammar.kind.value, grammar.text)
    return message


class GrammarCheck:
    """Compiles grammars as the workers will, under the same limits. Grammars that passed are remembered by their digest.

    The vocabulary is loaded with the first grammar, which takes up to seconds.
    """

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._path = model_dir / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._loading = asyncio.Lock()
        self._tokens: LLTokenizer | None = None
        self._pool: ThreadPoolExecutor | None = None

    async def check(self, grammar: Grammar) -> None:
        """Raises InvalidRequest that names what is wrong and where, ModelError when the tokenizer is unusable."""
        digest = hashlib.sha256(f"{grammar.kind}\0{grammar.text}".encode()).digest()
        if digest in self._known:
            self._known.move_to_end(digest)
            return
        loop = asyncio.get_running_loop()
        if self._pool is None:
            self._pool = deep_executor(2, "grammar-check")
        async with self._loading:
            if self._tokens is None:
                self._tokens = await loop.run_in_executor(self._pool, self._load)
        work = self._pool.submit(_compile, grammar, self._tokens)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.wrap_future(work)
        except TimeoutError:
            if work.cancel():
                raise UnavailableError("the check of grammars is busy; come back later", PATIENCE_S) from None
            raise InvalidRequest(f"sampling.grammar.{grammar.kind}: it takes too long to compile; simplify it") from None
        self._known[digest] = None
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    def close(self) -> None:
        """Stops the thread. Idempotent."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self) -> LLTokenizer:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        try:
            definition = Tokenizer.from_file(str(self._path))
            definition.no_padding()
            definition.no_truncation()
            size = max(self._vocab_size, int(definition.get_vocab_size(with_added_tokens=True)))
            return LLTokenizer(definition.to_str(), n_vocab=size, eos_token=self._eos_token_ids)
        except Exception as error:  # both libraries raise bare exceptions
            raise ModelError(f"{self._path}: is no tokenizer that grammars can use ({error})") from error


def _compile(grammar: Grammar, tokens: LLTokenizer) -> None:
    """Raises InvalidRequest for a grammar that does not compile, or that has no first token."""
    from llguidance import LLMatcher, LLParserLimits

    where = f"sampling.grammar.{grammar.kind}"
    try:
        match grammar.kind:
            case GrammarKind.JSON_SCHEMA:
                source = LLMatcher.grammar_from_json_schema(grammar.text, {"whitespace_pattern": JSON_SPACE})
            case GrammarKind.REGEX:
                source = LLMatcher.grammar_from_regex(grammar.text)
            case GrammarKind.LARK:
                source = LLMatcher.grammar_from_lark(grammar.text)
        matcher = LLMatcher(tokens, source, log_level=0, limits=LLParserLimits(verbose_errors=False, **_LIMITS))
        if matcher.is_error():
            raise InvalidRequest(f"{where}: {one_line(matcher.get_error())}")
        first = matcher.compute_bitmask()
    except AutanError:
        raise
    except BaseException as error:  # ValueError, and the panics of the library
        raise InvalidRequest(f"{where}: {one_line(str(error))}") from error
    if matcher.is_error() and not matcher.get_error().startswith("NoExtension"):
        raise InvalidRequest(f"{where}: {one_line(matcher.get_error().removesuffix('<non-verbose/>'))}")
    if matcher.is_error() or not any(first):
        raise InvalidRequest(f"{where}: no text fits it; change it so that it can end")
