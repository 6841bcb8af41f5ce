"""The protocol of a measured engine: JSON lines on standard input and output. Standard library only, for every peer's Python.

A question is `{"op": "run", "prompts": [[id, ...], ...], "max_tokens": n, "tokens": bool}`; the answer `{"seconds": s}`,
with `"outputs"` when tokens were asked for. The first line of a child, unasked, is `{"ready": {...facts}}`; it ends when
its standard input does. `{"error": text}` answers a question that failed.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], list[list[int]]]


def serve(load: Callable[[], tuple[Generate, dict[str, Any]]]) -> None:
    """Loads, says so, and answers until standard input ends.

    `load` returns a greedy generator that ignores end-of-sequence tokens, (prompts, max_tokens) -> outputs, and facts
    about it. Whatever libraries print goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(fields: dict[str, Any]) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        generate, facts = load()
    except Exception:
        answer({"error": traceback.format_exc()})
        return
    answer({"ready": facts})
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer(_run(generate, question))
        except Exception:
            answer({"error": traceback.format_exc()})


def _run(generate: Generate, question: dict[str, Any]) -> dict[str, Any]:
    max_tokens = question["max_tokens"]
    started_s = time.perf_counter()
    outputs = generate(question["prompts"], max_tokens)
    seconds = time.perf_counter() - started_s
    wrong = [len(output) for output in outputs if len(output) != max_tokens]
    if wrong or len(outputs) != len(question["prompts"]):
        raise RuntimeError(f"{len(outputs)} outputs, lengths other than {max_tokens}: {wrong}")
    return {"seconds": seconds, "outputs": outputs} if question.get("tokens") else {"seconds": seconds}
