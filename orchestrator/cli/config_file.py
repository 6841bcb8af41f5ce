"""`autan config check FILE` and `autan config show FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from configs.load import dump_effective, load_cluster
from configs.rank_shares import check_ranks
from orchestrator.cli.output import print_json, stdout

app = typer.Typer(help="Check a cluster file, or show it with every default filled in.", no_args_is_help=True)

File = Annotated[
    str, typer.Argument(metavar="FILE", help="Path of a cluster file, or the name of a preset (laptop, oracle, ...).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("check")
def check(file: File, as_json: Json = False) -> None:
    """Exit code 0 when the file is right; 2 and one line per error, with file, line and key path, when it is not.

    With the checkpoint's folder on this machine, also whether the ranks of each pool can share the model.
    """
    config = load_cluster(file)
    folder = Path(config.model.source).expanduser()
    if folder.is_dir():
        check_ranks(config.pools, folder)
    if as_json:
        print_json({"ok": True, "cluster": config.name, "pools": [pool.name for pool in config.pools]})
    else:
        stdout.print(f"{file}: ok (cluster {config.name}, {len(config.pools)} pools)")


@app.command("show")
def show(file: File, as_json: Json = False) -> None:
    """Prints the effective values."""
    config = load_cluster(file)
    if as_json:
        print_json(config.model_dump(mode="json"))
    else:
        stdout.print(dump_effective(config), markup=False, end="")
