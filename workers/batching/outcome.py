"""Takes the runner's answers into the sequences and tells what happened."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from protos.contract.errors import RequestError
from workers.batching.ledger import BlockLedger
from workers.batching.runner import Sampled
from workers.batching.sequence import Sequence, SequenceState
from workers.engine_api.types import EngineStats, Failed, ModelIdentity, Phase, PrefillProgress, StepResult, TokenOut


@dataclass(slots=True)
class Counters:
    """What an engine did since its start."""

    steps: int = 0
    prefill_chunks: int = 0
    prefill_tokens: int = 0
    prefix_hit_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0

    def stats(self, **gauges: Any) -> EngineStats:
        """The counters together with these gauges."""
        return EngineStats(**asdict(self), **gauges)


class StepOutcome:
    """One step. `left` no longer run; those of them that are `ended` have to give their blocks back."""

    def __init__(self, ledger: BlockLedger, identity: ModelIdentity, counters: Counters) -> None:
        self._ledger = ledger
        self._vocab_size = identity.vocab_size
        self._context_tokens = identity.context_tokens
        self._counters = counters
        self._tokens: list[TokenOut] = []
        self._progress: list[PrefillProgress] = []
        self._failed: list[Failed] = []
        self._batch_tokens = 0
        self.left: list[Sequence] = []
        self.ended: list[Sequence] = []
        counters.steps += 1

    def decoded(self, sequence: Sequence, drawn: Sampled) -> None:
        """One row of a decoding sequence was computed and a token drawn."""
        self._batch_tokens += 1
        if self._is_failure(sequence, drawn, sample=True):
            return
        self._counters.decode_tokens += 1
        sequence.num_computed += 1
        if sequence.num_computed % sequence.block_tokens == 0:
            self._ledger.file_computed(sequence)
        self._append(sequence, drawn)

    def prefilled(self, sequence: Sequence, count: int, drawn: Sampled) -> None:
        """`count` rows of a prompt were computed; behind the last one a token was drawn."""
        self._batch_tokens += count
        total = len(sequence.tokens)
        last = sequence.num_computed + count == total
        if self._is_failure(sequence, drawn, sample=last):
            return
        sequence.num_computed += count
        sequence.chunks += 1
        self._counters.prefill_chunks += 1
        self._counters.prefill_tokens += count
        self._ledger.file_computed(sequence)
        self._progress.append(
            PrefillProgress(*sequence.key, sequence.num_computed, total, sequence.cached_tokens, sequence.chunks)
        )
        if last:
            held = sequence.request.phase is Phase.PREFILL
            sequence.move(SequenceState.HELD if held else SequenceState.DECODING)
            self._append(sequence, drawn)

    def result(self) -> StepResult:
        return StepResult(tuple(self._tokens), tuple(self._progress), tuple(self._failed), self._batch_tokens)

    def _append(self, sequence: Sequence, drawn: Sampled) -> None:
        assert drawn.token_id is not None
        index = sequence.output_index
        finish = sequence.append(drawn.token_id, self._context_tokens)
        self._tokens.append(TokenOut(sequence.request_id, sequence.epoch, index, drawn.token_id, finish, drawn.logprobs))
        if sequence.state is SequenceState.HELD:
            self.left.append(sequence)
        elif finish is not None:
            self.left.append(sequence)
            self.ended.append(sequence)
        else:
            sequence.foresee()

    def _is_failure(self, sequence: Sequence, drawn: Sampled, *, sample: bool) -> bool:
        message = drawn.error
        if message is None and sample and not (drawn.token_id is not None and 0 <= drawn.token_id < self._vocab_size):
            message = f"the runner drew {drawn.token_id} from a vocabulary of {self._vocab_size}"
        if message is None:
            return False
        fault = None if sequence.constraint is None else sequence.constraint.fault
        self._failed.append(Failed(*sequence.key, message, isinstance(fault, RequestError)))
        self.left.append(sequence)
        self.ended.append(sequence)
        return True
