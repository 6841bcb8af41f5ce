"""`autan`: the operators' command. Every command has --json and the exit codes of the error tree.

0 done · 1 failed at run time · 2 bad usage or configuration · 3 cluster unreachable · 4 refused.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import typer

from orchestrator.cli.output import fail
from protos.contract.errors import AutanError

# The module below orchestrator.cli that has the function of the same name, in the order of the help.
_COMMANDS = {
    "up": "up",
    "down": "down",
    "status": "status",
    "generate": "generate",
    "requests": "requests",
    "cancel": "cancel",
    "migrate": "migrate",
    "drain": "migrate",
    "undrain": "migrate",
    "demo": "demo",
    "doctor": "doctor",
}
# The module that has commands below the name, as `app`.
_GROUPS = {"kv": "kv", "config": "config_file", "model": "model", "plan": "plan", "tls": "tls"}


def command_line(name: str | None = None) -> typer.Typer:
    """The command with all that is below it; with the name of a command, only that one.

    A command that asks a running cluster loads in a third of the time that all of them take: `up` is a whole orchestrator.
    """
    app = typer.Typer(
        name="autan",
        help="Disaggregated prefill/decode serving for Mistral Small 4.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_nothing)  # with one command below it, it would be that command
    known = name in _COMMANDS or name in _GROUPS
    for command, module in _COMMANDS.items():
        if command == name or not known:
            app.command(command)(getattr(_module(module), command))
    for group, module in _GROUPS.items():
        if group == name or not known:
            app.add_typer(_module(module).app, name=group)
    return app


def _nothing() -> None:
    pass


def _module(name: str) -> Any:
    return import_module(f"orchestrator.cli.{name}")


def main() -> None:
    """Entry point of the command. Errors of the tree become one sentence on stderr and their exit code."""
    arguments = sys.argv[1:]
    try:
        command_line(arguments[0] if arguments else None)()
    except AutanError as error:
        fail(error, as_json="--json" in arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
