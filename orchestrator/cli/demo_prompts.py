"""The prompts of `autan demo`: a question, code to mend, a text to rewrite, and a long document to read."""

from __future__ import annotations

from dataclasses import dataclass

_AVERAGE = """Mend this Python function. It must not crash on an empty list.

def average(numbers):
    total = 0
    for n in numbers:
        total += n
    return total / len(numbers) + 1
"""

_EMAIL = """Rewrite this e-mail so that it is polite:

You lot broke the build AGAIN. I am sick of it. Fix it today or I will tell your boss what a useless team you are."""


@dataclass(frozen=True, slots=True)
class DemoPrompt:
    """One prompt with a label and how many tokens to answer with."""

    label: str
    text: str
    max_tokens: int


def incident_log(lines: int) -> str:
    """A made-up operations log, the same at every call: about 24 tokens a line."""
    places = ("north hall", "south hall", "annex", "roof plant", "loading bay")
    things = ("fan tray", "power shelf", "cooling pump", "network switch", "battery rack")
    acts = ("was replaced", "raised an alarm", "was inspected", "ran hot for a while", "came back to normal")
    people = ("Amina", "Bruno", "Chiara", "Dev", "Elif", "Farid", "Greta")
    return "\n".join(
        f"{8 + (i * 7) // 60:02d}:{(i * 7) % 60:02d} {things[(i * 3) % 5]} {1 + i % 9} in the {places[(i * 2) % 5]} "
        f"{acts[(i * i) % 5]}; {people[i % 7]} took note."
        for i in range(lines)
    )


def demo_prompts(max_tokens: int) -> list[DemoPrompt]:
    """Four prompts; the last one is longer than 1,500 tokens for every byte-level BPE tokenizer."""
    return [
        DemoPrompt("chat", "Why is the sky blue? Answer in two or three sentences.", max_tokens),
        DemoPrompt("code", _AVERAGE, max_tokens),
        DemoPrompt("rewrite", _EMAIL, max_tokens),
        DemoPrompt(
            "long",
            "Here is the log of one working day:\n\n"
            + incident_log(72)
            + "\n\nWhich kinds of things does this log talk about?",
            max_tokens,
        ),
    ]
