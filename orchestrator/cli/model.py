"""`autan model import | tiny | quantise | inspect`: checkpoint files.

The work is done by the torch engine's own tool in a process of its own, so that the command starts without torch and the
orchestrator never parses a checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from configs.env import model_cache_dir

app = typer.Typer(help="Import, write and inspect checkpoints.", no_args_is_help=True)

TOOL_MODULE = "workers.engines.torch.model_tool"
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def run_tool(arguments: list[str]) -> None:
    """Runs the tool with its output passed through; exits with its code when that is not 0."""
    done = subprocess.run([sys.executable, "-m", TOOL_MODULE, *arguments], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


@app.command("import")
def import_model(
    out: Annotated[Path | None, typer.Option(help="Cache folder; default: AUTAN_MODEL_CACHE.")] = None, as_json: Json = False
) -> None:
    """Turns the demo model's GGUF file into safetensors once; later calls find it in the cache."""
    run_tool(["import", "--cache", str(out or model_cache_dir()), *(["--json"] if as_json else [])])


@app.command("tiny")
def tiny(
    kind: Annotated[str, typer.Argument(help="mistral-small-4, llama or mistral.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    layout: Annotated[str, typer.Option(help="hf, or native: params.json and consolidated*.safetensors.")] = "hf",
    weights: Annotated[str, typer.Option("--format", help="fp32, bf16, fp8, nvfp4, int8 or int4.")] = "fp32",
    shards: Annotated[int, typer.Option(help="Number of weight files.")] = 1,
    dims: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A value of the configuration.")] = None,
    as_json: Json = False,
) -> None:
    """Writes a random toy checkpoint in the published file format."""
    chosen = ["--seed", str(seed), "--layout", layout, "--format", weights, "--shards", str(shards)]
    for assignment in dims or []:
        chosen += ["--set", assignment]
    run_tool(["tiny", kind, str(out), *chosen, *(["--json"] if as_json else [])])


@app.command("quantise")
def quantise(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    weights: Annotated[str, typer.Option("--format", help="int8, int4 or fp8.")],
    as_json: Json = False,
) -> None:
    """Writes a checkpoint again with its linear layers in fewer bits, file by file."""
    run_tool(["quantise", str(model), str(out), "--format", weights, *(["--json"] if as_json else [])])


@app.command("inspect")
def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR|PRESET", help="A checkpoint folder, or mistral-small-4.")],
    check: Annotated[bool, typer.Option("--check", help="Read every tensor; refuse NaN and infinities.")] = False,
    as_json: Json = False,
) -> None:
    """Prints architecture, parameters, bytes per format on disk and in memory, and KV bytes per token."""
    run_tool(["inspect", model, *(["--check"] if check else []), *(["--json"] if as_json else [])])
