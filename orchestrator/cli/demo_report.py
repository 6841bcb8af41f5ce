"""What the demo prints: answers as they stream, then where the time of each request went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from orchestrator.cli.output import print_table, stdout
from orchestrator.client import Accepted, AsyncClient, Delta, Finished
from protos.wire import common

_LINE_CHARS = 110


@dataclass(slots=True)
class Answer:
    """One request of the demo as its client saw it. `arrivals_s` has one monotonic time per token."""

    label: str
    submitted_s: float = 0.0
    request_id: str = ""
    prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    finish_reason: str = ""
    timeline: common.Timeline = field(default_factory=common.Timeline)

    @property
    def ttft_s(self) -> float:
        """Submit to first token, at the client."""
        return self.arrivals_s[0] - self.submitted_s if self.arrivals_s else 0.0

    def itl_ms(self, percentile: float) -> float:
        """A percentile of the gaps between consecutive tokens, milliseconds; nearest rank."""
        gaps = sorted(b - a for a, b in zip(self.arrivals_s, self.arrivals_s[1:], strict=False))
        return 1000 * gaps[min(len(gaps) - 1, int(percentile / 100 * len(gaps)))] if gaps else 0.0

    @property
    def hidden_share(self) -> float | None:
        """1 - time exposed after the prefill ended / transfer time (DESIGN): the part of the hand-off that cost nothing."""
        return hidden_share(self.timeline)


def hidden_share(timeline: common.Timeline) -> float | None:
    """Between 0 and 1; none when nothing was transferred."""
    if timeline.handoff_s <= 0:
        return None
    return min(1.0, max(0.0, 1 - timeline.handoff_exposed_s / timeline.handoff_s))


class LinePrinter:
    """Text of several streams, printed by whole lines with the label of each in front."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._held = ""

    def add(self, text: str) -> None:
        """Prints the lines that are complete now; long ones break at a space."""
        self._held += text
        while True:
            line, newline, rest = self._held.partition("\n")
            if not newline:
                if len(self._held) <= _LINE_CHARS or " " not in self._held[:_LINE_CHARS]:
                    return
                cut = self._held.rindex(" ", 0, _LINE_CHARS)
                line, rest = self._held[:cut], self._held[cut + 1 :]
            self._print(line)
            self._held = rest

    def end(self) -> None:
        """Prints what is left."""
        if self._held:
            self._print(self._held)
        self._held = ""

    def _print(self, line: str) -> None:
        stdout.print(f"{self._label:>8} | {line}", markup=False, highlight=False)


async def stream_answer(client: AsyncClient, label: str, options: dict[str, Any]) -> Answer:
    """Runs one request, prints its text as it comes, and returns what was measured. Raises what the request ended with."""
    answer, printer = Answer(label, submitted_s=time.monotonic()), LinePrinter(label)
    async for event in client.generate(**options):
        match event:
            case Accepted():
                answer.request_id, answer.prompt_tokens = event.request_id, event.prompt_tokens
            case Delta():
                answer.token_ids += event.token_ids
                answer.arrivals_s += [time.monotonic()] * len(event.token_ids)
                printer.add(event.text)
            case Finished():
                printer.add(event.text)
                answer.finish_reason = event.reason
                answer.timeline.CopyFrom(event.timeline)
    printer.end()
    return answer


def print_timelines(answers: list[Answer]) -> None:
    """One row per request: queue, prefill, hand-off, TTFT, ITL."""
    print_table(
        ("request", "prompt", "queue", "prefill", "chunks", "hand-off", "hidden", "TTFT", "tokens", "ITL p50/p99", "finish"),
        [
            (
                answer.label,
                f"{answer.prompt_tokens} tok",
                f"{1000 * answer.timeline.queue_s:.0f} ms",
                f"{answer.timeline.prefill_s:.2f} s",
                answer.timeline.prefill_chunks,
                handoff_text(answer.timeline),
                "-" if answer.hidden_share is None else f"{100 * answer.hidden_share:.0f} %",
                f"{answer.ttft_s:.2f} s",
                len(answer.token_ids),
                f"{answer.itl_ms(50):.0f}/{answer.itl_ms(99):.0f} ms",
                answer.finish_reason,
            )
            for answer in answers
        ],
    )


def handoff_text(timeline: common.Timeline) -> str:
    """`27 blocks, 79.6 MB, 410 MB/s`; MB are 10^6 bytes."""
    megabytes = timeline.handoff_bytes / 1e6
    speed = megabytes / timeline.handoff_s if timeline.handoff_s > 0 else 0.0
    return f"{timeline.handoff_blocks} blocks, {megabytes:.1f} MB, {speed:.0f} MB/s"


def answer_json(answer: Answer) -> dict[str, Any]:
    """The same for programs; times in seconds and milliseconds as named."""
    timeline = answer.timeline
    return {
        "label": answer.label,
        "request_id": answer.request_id,
        "prompt_tokens": answer.prompt_tokens,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "queue_s": timeline.queue_s,
        "prefill_s": timeline.prefill_s,
        "prefill_chunks": timeline.prefill_chunks,
        "handoff_blocks": timeline.handoff_blocks,
        "handoff_bytes": int(timeline.handoff_bytes),
        "handoff_s": timeline.handoff_s,
        "handoff_exposed_s": timeline.handoff_exposed_s,
        "hidden_share": answer.hidden_share,
        "ttft_s": answer.ttft_s,
        "itl_p50_ms": answer.itl_ms(50),
        "itl_p99_ms": answer.itl_ms(99),
    }
