"""Scripts for the core: commands, `----`, and every decision that they bring about. `AUTAN_UPDATE_GOLDEN=1` rewrites them.

Commands: `instance NAME [key=value ...]`, `change NAME key=value ...`, `submit NAME [key=value ...]`, `run SECONDS`,
`hand-over NAME`, `finish NAME`, `requeue NAME`, `silence NAME`, `leader NAME`, `store-lost`, `store-back`. Views and timers
are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control import effects as do
from orchestrator.control import events as on
from orchestrator.control.story import Entry
from orchestrator.domain.instance import InstanceState
from tests.support.core_world import CoreWorld, a_request, an_instance, capabilities

SCRIPTS = sorted((Path(__file__).parent / "core").glob("*.txt"))
CAPS = {"blocks", "batch_tokens", "running", "fingerprint", "context"}


def values(words: list[str]) -> dict[str, Any]:
    pairs = dict(word.split("=", 1) for word in words)
    return {key: int(value) if value.lstrip("-").isdigit() else value for key, value in pairs.items()}


def carry_out(world: CoreWorld, line: str) -> None:
    """One command."""
    command, *words = line.split()
    match command:
        case "instance":
            options = values(words[1:])
            caps = capabilities(**{key: value for key, value in options.items() if key in CAPS})
            rest = {key: value for key, value in options.items() if key not in CAPS}
            world.add(an_instance(words[0], caps=caps, beat_ms=world.now_ms, **rest))
        case "change":
            options = values(words[1:])
            if "state" in options:
                options["state"] = InstanceState(options["state"])
            world.instances[words[0]] = replace(world.instances[words[0]], **options)
        case "submit":
            world.submit(a_request(words[0], **values(words[1:])))
        case "run":
            world.run(float(words[0]))
        case "hand-over":
            world.hand_over(words[0])
        case "finish":
            world.finish(words[0])
        case "requeue":
            world.requeue(words[0])
        case "silence":
            world.silent.add(words[0])
        case "leader":
            world.leader = (words[0] if words[0] != "nobody" else "", world.leader[1] + 1)
        case "store-lost":
            world.pending.clear()
            world.feed(on.StoreLost("script"))
        case "store-back":
            world.feed(on.StoreBack())
        case _:
            raise ValueError(f"unknown command: {line}")


def told(entry: Entry) -> str | None:
    """A decision as one line, or None for what scripts leave out."""
    what = entry.what
    at = f"{entry.at_s:.2f}"
    match what:
        case do.Lead() if what.epoch == 0:
            return f"{at} lead?"
        case on.LeadershipGained():
            return f"{at} leads under {what.epoch}"
        case on.LeadershipLost():
            return f"{at} lost the lead of {what.epoch}"
        case do.Assign():
            items = ", ".join(
                f"{item.request_id}@{item.expected_epoch} {item.prefill}>{item.decode} "
                f"{item.prefill_blocks}+{item.decode_blocks}"
                for item in what.items
            )
            return f"{at} assign {items}"
        case do.Explain():
            return f"{at} {what.request_id} waits: {what.reason.name}"
        case on.Reaped() if what.requests or what.lost:
            ended = [f"{ended.request_id} {ended.state}" for ended in what.requests]
            return f"{at} reaped {', '.join([*ended, *(f'{name} LOST' for name in what.lost)])}"
        case _:
            return None


def blocks(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """(commands with comments, expected lines) of every block; blocks are separated by empty lines."""
    for block in text.strip().split("\n\n"):
        commands, _, expected = block.partition("\n----")
        yield commands.splitlines(), expected.strip("\n").splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script(script: Path) -> None:
    world = CoreWorld()
    rewritten, wanted, got = [], [], []
    seen = 0
    for commands, expected in blocks(script.read_text(encoding="utf-8")):
        for line in commands:
            if line.strip() and not line.startswith("#"):
                carry_out(world, line)
        log = list(world.recorder)
        lines = [line for entry in log[seen:] if (line := told(entry)) is not None]
        seen = len(log)
        rewritten.append("\n".join([*commands, "----", *lines]))
        wanted.append(expected)
        got.append(lines)
    if os.environ.get("AUTAN_UPDATE_GOLDEN"):
        script.write_text("\n\n".join(rewritten) + "\n", encoding="utf-8")
    else:
        assert got == wanted


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 4
