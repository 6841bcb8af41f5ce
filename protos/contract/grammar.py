"""What a grammar is, and what front door and workers allow one to cost.

Both sides compile a request's grammar with the same library under the same limits, so that what the door lets in compiles
on every worker. The library recurses once for every rule that refers to the next: within MAX_GRAMMAR_BYTES a chain of
thousands fits, which overruns an ordinary thread's stack and would end the process. It therefore runs on
`deep_executor` threads only.
"""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

from protos.contract.errors import InvalidRequest

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_LARK_LINES = 1024
STACK_BYTES = 256 * 1024 * 1024  # address space; four times what the deepest chain of MAX_GRAMMAR_BYTES was seen to touch
ANY_OBJECT = '{"type":"object"}'
JSON_SPACE = r"(?:(?:\r?\n){1,2}[ \t]{0,40}|[ \t]{1,40})"  # runs without an end would let a model fill its output with blanks

PARSER_LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # 1-2 KB each, for every running sequence
    "max_grammar_size": 100_000,
}
"""Keyword arguments of llguidance.LLParserLimits: an ordinary mask takes microseconds, the costliest some tens of ms."""

_LISTING = re.compile(r"\s*(\d+ \||\^\s*$)")
_stack_lock = threading.Lock()


class GrammarKind(StrEnum):
    """How the text is to be read."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"  # of the whole output; the syntax of Rust's regex crate, without look-around
    LARK = "lark"  # llguidance's dialect


@dataclass(frozen=True, slots=True)
class Grammar:
    """The texts that an output may be."""

    kind: GrammarKind
    text: str


def check_grammar_size(grammar: Grammar, where: str) -> None:
    """Raises InvalidRequest for an empty grammar or one that may not be compiled at all."""
    size = len(grammar.text.encode())
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"{where}: {size} bytes, more than {MAX_GRAMMAR_BYTES}; shorten it")
    if not grammar.text:
        raise InvalidRequest(f"{where}: it is empty; leave it out for free text")
    lines = grammar.text.count("\n") + 1
    if grammar.kind is GrammarKind.LARK and lines > MAX_LARK_LINES:
        raise InvalidRequest(f"{where}: {lines} lines, more than {MAX_LARK_LINES}; shorten it")


def one_line(message: str, most: int = 300) -> str:
    """A library's message, fit for an error: without its listing of the source, white space folded, the middle cut out."""
    told = [line for line in message.splitlines() if not _LISTING.match(line)]
    folded = " ".join(" ".join(told).split())
    return folded if len(folded) <= most else f"{folded[: most // 3]} ... {folded[-most // 2 :]}"


def deep_executor(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads have STACK_BYTES of stack; all of them are running when this returns."""
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
    together = threading.Barrier(threads + 1)
    with _stack_lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            for _ in range(threads):
                pool.submit(together.wait)  # no thread is idle before all have started, so each call starts one
        finally:
            threading.stack_size(before)
    together.wait()
    return pool
