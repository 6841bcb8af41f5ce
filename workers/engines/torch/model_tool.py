"""Models from the command line: `python -m workers.engines.torch.model_tool import|tiny|inspect`.

With `--json` every line of standard output is one JSON object; the last has `"event": "done"` or `"event": "error"`.
Exit codes: 0 done, 1 failed at run time, 2 bad usage or an unusable model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.env import model_cache_dir
from configs.model_card import read_model_card
from protos.contract.errors import AutanError, ModelError
from workers.engines.torch.config import read_config
from workers.engines.torch.demo_model import ensure_demo_model
from workers.engines.torch.models.registry import shapes_of
from workers.engines.torch.tiny import KINDS, write_tiny
from workers.engines.torch.weights import check_checkpoint, weights_digest

__all__ = ["ensure_demo_model", "main"]


class Report:
    """Lines for a reader or for a program."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._shown: dict[str, int] = {}

    def progress(self, what: str, done: int, total: int) -> None:
        """One line per tenth of a stage."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    report = Report(as_json=options.json)
    try:
        done, text = _COMMANDS[options.command](options, report)
    except AutanError as error:
        report.error(error)
        return error.exit_code
    report.line({"event": "done", **done}, text)
    return 0


def _import(options: argparse.Namespace, report: Report) -> tuple[dict[str, Any], str]:
    folder = ensure_demo_model(options.cache or model_cache_dir(), report.progress, options.gguf)
    return {"path": str(folder)}, f"demo model: {folder}"


def _tiny(options: argparse.Namespace, report: Report) -> tuple[dict[str, Any], str]:
    folder = write_tiny(options.kind, options.out_dir, options.seed, **dict(map(_dimension, options.set)))
    return {"path": str(folder)}, f"tiny {options.kind} (random weights, text only): {folder}"


def _dimension(assignment: str) -> tuple[str, Any]:
    key, _, value = assignment.partition("=")
    try:
        return key, json.loads(value)
    except ValueError as error:
        raise ModelError(f"--set {assignment}: expected KEY=VALUE with a JSON value") from error


def _inspect(options: argparse.Namespace, report: Report) -> tuple[dict[str, Any], str]:
    folder: Path = options.model_dir
    config, card = read_config(folder), read_model_card(folder)
    parameters = check_checkpoint(folder, shapes_of(config))
    facts = {
        "path": str(folder),
        "architecture": config.architecture,
        "parameters": parameters,
        "kv_values_per_token": config.kv_row_values * config.num_layers,
        "kv_layout": config.kv_layout_name,
        "context_tokens": card.context_tokens,
        "eos_token_ids": list(card.eos_token_ids),
        "has_tokenizer": card.has_tokenizer,
        "has_chat_template": card.has_chat_template,
        "weights_digest": weights_digest(folder),
        "config": asdict(config),
    }
    return facts, "\n".join(f"{key}: {value}" for key, value in facts.items())


_COMMANDS = {"import": _import, "tiny": _tiny, "inspect": _inspect}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="model_tool", description="Import, make and look at checkpoints.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object per line")
    commands = parser.add_subparsers(dest="command", required=True)
    found = commands.add_parser("import", parents=[common], help="import the demo model into the cache")
    found.add_argument("--cache", type=Path, help="cache folder (default: AUTAN_MODEL_CACHE)")
    found.add_argument("--gguf", type=Path, help="this GGUF file instead of the installed package's")
    found = commands.add_parser("tiny", parents=[common], help="write a random tiny checkpoint (text only)")
    found.add_argument("kind", choices=KINDS)
    found.add_argument("out_dir", type=Path)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a value of the text configuration")
    found = commands.add_parser("inspect", parents=[common], help="check a checkpoint folder and print its facts")
    found.add_argument("model_dir", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
