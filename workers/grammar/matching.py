"""Masks of running sequences, computed on threads of their own while the model computes.

A step samples one token for a sequence; the batcher shows it to `follow` at once, and the mask of the next token is
computed while the next forward pass runs. The runner waits for it before it samples, and no longer than PATIENCE_S.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from protos.contract.errors import AutanError, EngineFailure, InvalidRequest, ModelError
from protos.contract.grammar import deep_executor, one_line
from workers.batching.runner import AllowedTokens
from workers.engine_api.types import SamplingParams
from workers.grammar.bits import add, contains, sized, without
from workers.grammar.compiled import CompiledGrammars
from workers.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

logger = logging.getLogger(__name__)

PATIENCE_S = 5.0  # a step waits no longer for one mask; an ordinary one takes microseconds
BUDGET_S = 30.0  # all waiting of one sequence, in all its steps


class LlguidanceConstrainer:
    """Implements `workers.batching.constraint.Constrainer` for one vocabulary, which is loaded in the background."""

    def __init__(self, load: Vocabulary, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._grammars = CompiledGrammars(load)
        self._vocab_size = vocab_size
        self._eos = frozenset(eos_token_ids)
        self._pool = deep_executor(max(2, min(4, (os.cpu_count() or 2) // 2)), "grammar")
        self._pool.submit(self._warm_up)

    def open(self, sampling: SamplingParams, num_prompt: int) -> SequenceMatcher:
        """See Constrainer.open."""
        if not self._eos & sampling.stop_token_ids:
            raise InvalidRequest("grammar: with ignore_eos the output could not end; leave one of them out")
        return SequenceMatcher(self._pool, self._grammars, sampling, num_prompt, self._vocab_size, self._eos)

    def close(self) -> None:
        """See Constrainer.close."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _warm_up(self) -> None:
        try:
            self._grammars.vocabulary()
        except ModelError as error:
            logger.warning("requests with a grammar will fail: %s", error)


class SequenceMatcher:
    """Implements `workers.batching.constraint.Constraint`.

    `follow` belongs to the engine's thread. Its jobs share a box of tokens: whichever job runs first takes all that are
    there, so their order does not matter.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        grammars: CompiledGrammars,
        sampling: SamplingParams,
        num_prompt: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        assert sampling.grammar is not None
        self._pool = pool
        self._grammars = grammars
        self._grammar = sampling.grammar
        self._min_tokens = sampling.min_tokens
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._ends = sorted(sampling.stop_token_ids)
        self._seen = num_prompt  # tokens shown so far, prompt included
        self._pending: AllowedTokens | None = None
        self._waited_s = 0.0
        self._box: deque[int] = deque()
        self._lock = threading.Lock()  # guards what jobs use: the two below
        self._matcher: LLMatcher | None = None
        self._taken = 0
        self.fault: AutanError | None = None

    def follow(self, tokens: Sequence[int]) -> AllowedTokens:
        """See Constraint.follow."""
        if self._pending is None or len(tokens) > self._seen:
            self._box.extend(tokens[self._seen :])
            self._seen = len(tokens)
            self._pending = partial(self._wait, self._pool.submit(self._job))
        return self._pending

    def _wait(self, job: Future[bytearray]) -> memoryview:
        """Raises InvalidRequest when the grammar is to blame, EngineFailure when it takes too long."""
        started_s = time.monotonic()
        try:
            mask = job.result(min(PATIENCE_S, BUDGET_S - self._waited_s))
        except TimeoutError:
            self.fault = EngineFailure(f"grammar: the mask of output token {self._taken} took too long; simplify the grammar")
            raise self.fault from None
        except AutanError as error:
            self.fault = error
            raise
        self._waited_s += time.monotonic() - started_s
        return memoryview(mask).cast("i")

    def _job(self) -> bytearray:
        try:
            with self._lock:
                return self._advance()
        except AutanError:
            raise
        except BaseException as error:  # the library panics with a BaseException
            raise InvalidRequest(f"grammar: the parser gave up: {one_line(str(error))}") from error

    def _advance(self) -> bytearray:
        if self._matcher is None:
            self._matcher = self._grammars.matcher(self._grammar)
        while self._box:
            token_id = self._box.popleft()
            if not self._matcher.consume_token(token_id):
                raise InvalidRequest(f"grammar: output token {self._taken} ({token_id}): {self._story(self._matcher)}")
            self._taken += 1
        return self._mask(self._matcher)

    def _mask(self, matcher: LLMatcher) -> bytearray:
        mask = bytearray(4 * -(-self._vocab_size // 32))
        if matcher.is_stopped() and not matcher.is_error():
            add(mask, self._ends)  # complete, and nothing may be added
            return mask
        mask = sized(matcher.compute_bitmask(), self._vocab_size)
        if matcher.is_error():
            raise InvalidRequest(f"grammar: after {self._taken} output tokens: {self._story(matcher)}")
        if any(contains(mask, token_id) for token_id in self._eos):
            add(mask, self._ends)
        if not any(mask):
            raise InvalidRequest(f"grammar: no token of the model continues it after {self._taken} output tokens")
        if self._taken < self._min_tokens:
            longer = without(mask, self._ends)
            return longer if any(longer) else mask
        return mask

    def _story(self, matcher: LLMatcher) -> str:
        if matcher.get_error().startswith("NoExtensionBias"):
            return "it allows no text from here on"
        return one_line(matcher.get_error().removesuffix("<non-verbose/>")) or "it does not fit"
