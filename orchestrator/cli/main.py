"""`autan`: the operators' command. Every command has --json and the exit codes of the error tree.

0 done · 1 failed at run time · 2 bad usage or configuration · 3 cluster unreachable · 4 refused.
"""

from __future__ import annotations

import sys

import typer

from orchestrator.cli import (
    cancel,
    config_file,
    demo,
    doctor,
    down,
    generate,
    kv,
    migrate,
    model,
    plan,
    requests,
    status,
    tls,
    up,
)
from orchestrator.cli.output import fail
from protos.contract.errors import AutanError

app = typer.Typer(
    name="autan",
    help="Disaggregated prefill/decode serving for Mistral Small 4.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("down")(down.down)
app.command("status")(status.status)
app.command("generate")(generate.generate)
app.command("requests")(requests.requests)
app.command("cancel")(cancel.cancel)
app.command("migrate")(migrate.migrate)
app.command("drain")(migrate.drain)
app.command("undrain")(migrate.undrain)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.add_typer(kv.app, name="kv")
app.add_typer(config_file.app, name="config")
app.add_typer(model.app, name="model")
app.add_typer(plan.app, name="plan")
app.add_typer(tls.app, name="tls")


def main() -> None:
    """Entry point of the command. Errors of the tree become one sentence on stderr and their exit code."""
    try:
        app()
    except AutanError as error:
        fail(error, as_json="--json" in sys.argv[1:])
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
