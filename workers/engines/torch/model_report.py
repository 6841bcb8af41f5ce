"""What the model tool tells while and after it works: a bar for a terminal, lines for a log, JSON for a program."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from protos.contract.errors import AutanError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Report:
    """Lines for a reader or for a program; entered, it shows progress as a bar when standard error is a terminal."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._shown: dict[str, int] = {}
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> None:
        if self._as_json or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._bar.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def progress(self, what: str, done: int, total: int) -> None:
        """Moves the bar of a stage, or writes one line per tenth of it."""
        if self._bar is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=max(total, 1))
            self._bar.update(self._tasks[what], completed=done)
            return
        tenth = 10 * done // max(total, 1)
        if self._shown.get(what) != tenth:
            self._shown[what] = tenth
            self.line({"event": "progress", "stage": what, "done": done, "total": total}, f"{what}: {done}/{total}")

    def line(self, fields: dict[str, Any], text: str) -> None:
        """The fields as JSON, or the text."""
        sys.stdout.write((json.dumps(fields) if self._as_json else text) + "\n")
        sys.stdout.flush()

    def error(self, error: AutanError) -> None:
        """The refusal, on the channel where its reader looks."""
        if self._as_json:
            self.line({"event": "error", "reason": error.reason, "message": error.message}, "")
        else:
            sys.stderr.write(f"error: {error.message}\n")
