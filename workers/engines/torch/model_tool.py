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
from configs.native_params import layout_of_folder
from protos.contract.errors import AutanError, ModelError
from workers.engines.torch.config import DecoderConfig, parse_config, read_raw_config
from workers.engines.torch.demo_model import ensure_demo_model
from workers.engines.torch.model_facts import bytes_per_format, count_parameters, kv_bytes_per_token, preset
from workers.engines.torch.models.registry import shapes_of
from workers.engines.torch.stored_tensors import stored_formats
from workers.engines.torch.tiny import KINDS, write_tiny
from workers.engines.torch.tiny_files import ENCODINGS, LAYOUTS
from workers.engines.torch.weights import check_checkpoint, shard_paths, weights_digest

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
    folder = write_tiny(
        options.kind,
        options.out_dir,
        options.seed,
        layout=options.layout,
        encoding=options.format,
        shards=options.shards,
        **dict(map(_dimension, options.set)),
    )
    return {"path": str(folder)}, f"tiny {options.kind} (random weights, text only): {folder}"


def _dimension(assignment: str) -> tuple[str, Any]:
    key, _, value = assignment.partition("=")
    try:
        return key, json.loads(value)
    except ValueError as error:
        raise ModelError(f"--set {assignment}: expected KEY=VALUE with a JSON value") from error


def _inspect(options: argparse.Namespace, report: Report) -> tuple[dict[str, Any], str]:
    folder = Path(options.model)
    if not folder.is_dir():
        raw, where = preset(options.model), options.model
        config = parse_config(raw, where)
        facts = {"preset": options.model, **_config_facts(config, raw, where)}
    else:
        raw, where = read_raw_config(folder)
        config, card = parse_config(raw, where), read_model_card(folder)
        facts = {"path": str(folder), "layout": layout_of_folder(folder), **_config_facts(config, raw, where)}
        facts |= {
            "context_tokens": card.context_tokens,
            "eos_token_ids": list(card.eos_token_ids),
            "has_tokenizer": card.has_tokenizer,
            "has_chat_template": card.has_chat_template,
            **_weight_facts(folder, config),
        }
    facts["config"] = asdict(config)
    return facts, "\n".join(f"{key}: {_shown(value)}" for key, value in facts.items())


def _config_facts(config: DecoderConfig, raw: dict[str, Any], where: str) -> dict[str, Any]:
    blocks = count_parameters(config, raw, where)
    total = sum(blocks.values())
    return {
        "architecture": config.architecture,
        "parameters": total,
        "text_parameters": total - blocks.get("vision", 0) - blocks.get("projector", 0),
        "parameters_by_block": blocks,
        "bytes_by_format": bytes_per_format(config, total),
        "kv_values_per_token": config.kv_row_values * config.num_layers,
        "kv_bytes_per_token_bf16": kv_bytes_per_token(config),
        "kv_layout": config.kv_layout_name,
    }


def _weight_facts(folder: Path, config: DecoderConfig) -> dict[str, Any]:
    """Checks the tensors against the configuration; a folder without weight files is described all the same."""
    if not any(folder.glob("*.safetensors*")):
        return {"weights": "none"}
    check_checkpoint(folder, shapes_of(config))
    return {
        "weights": sorted(stored_formats(folder)),
        "weights_bytes": sum(path.stat().st_size for path in shard_paths(folder)),
        "weights_digest": weights_digest(folder),
    }


def _shown(value: object, indent: str = "\n  ") -> str:
    if isinstance(value, dict):
        return "".join(f"{indent}{key}: {_shown(inner, indent + '  ')}" for key, inner in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


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
    found.add_argument("--layout", choices=LAYOUTS, default="hf", help="Hugging Face's files or Mistral's own")
    found.add_argument("--format", choices=ENCODINGS, default="fp32", help="number format of the weights")
    found.add_argument("--shards", type=int, default=1, help="weight files")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a value of the text configuration")
    found = commands.add_parser("inspect", parents=[common], help="check a folder, or take a preset, and print its facts")
    found.add_argument("model", metavar="DIR|PRESET")
    return parser


if __name__ == "__main__":
    sys.exit(main())
