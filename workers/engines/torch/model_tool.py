"""Models from the command line: `python -m workers.engines.torch.model_tool import|tiny|quantise|inspect`.

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
from workers.engines.torch.model_facts import (
    bytes_per_format,
    count_parameters,
    kv_bytes_per_token,
    preset,
    stored_bytes_by_format,
)
from workers.engines.torch.model_report import Report
from workers.engines.torch.quantise import TARGETS, quantise
from workers.engines.torch.registry import shapes_of
from workers.engines.torch.stored_tensors import count_activation_scales
from workers.engines.torch.tiny import KINDS, write_tiny
from workers.engines.torch.tiny_files import ENCODINGS, LAYOUTS
from workers.engines.torch.weights import check_checkpoint, check_values, shard_paths, weights_digest

__all__ = ["ensure_demo_model", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    report = Report(as_json=options.json)
    try:
        with report:
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


def _quantise(options: argparse.Namespace, report: Report) -> tuple[dict[str, Any], str]:
    folder = quantise(options.model, options.out_dir, options.format, report.progress)
    sizes = [sum(path.stat().st_size for path in shard_paths(where)) for where in (options.model, folder)]
    facts = {"path": str(folder), "format": options.format, "source_bytes": sizes[0], "weights_bytes": sizes[1]}
    return facts, f"{options.format} copy ({sizes[0]:,} to {sizes[1]:,} bytes): {folder}"


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
            **_weight_facts(folder, config, report, read_all=options.check),
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


def _weight_facts(folder: Path, config: DecoderConfig, report: Report, *, read_all: bool) -> dict[str, Any]:
    """Checks the tensors against the configuration; a folder without weight files is described all the same."""
    if not any(folder.glob("*.safetensors*")):
        return {"weights": "none"}
    shapes = shapes_of(config)
    check_checkpoint(folder, shapes)
    if read_all:
        check_values(folder, shapes, report.progress)
    stored = stored_bytes_by_format(folder, config)
    return {
        "weights": sorted(stored),
        "weights_bytes": sum(path.stat().st_size for path in shard_paths(folder)),
        "weights_by_format": stored,
        "memory_bytes_bf16": sum(sums["memory_bytes"] for sums in stored.values()),
        "activation_scales": count_activation_scales(folder),
        "weights_digest": weights_digest(folder),
    }


def _shown(value: object, indent: str = "\n  ") -> str:
    if isinstance(value, dict):
        return "".join(f"{indent}{key}: {_shown(inner, indent + '  ')}" for key, inner in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


_COMMANDS = {"import": _import, "tiny": _tiny, "quantise": _quantise, "inspect": _inspect}


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
    found = commands.add_parser("quantise", parents=[common], help="write a checkpoint again in fewer bits")
    found.add_argument("model", type=Path, metavar="DIR")
    found.add_argument("out_dir", type=Path)
    found.add_argument("--format", choices=TARGETS, required=True, help="number format of the linear layers")
    found = commands.add_parser("inspect", parents=[common], help="check a folder, or take a preset, and print its facts")
    found.add_argument("model", metavar="DIR|PRESET")
    found.add_argument("--check", action="store_true", help="read every tensor and refuse NaN and infinities")
    return parser


if __name__ == "__main__":
    sys.exit(main())
