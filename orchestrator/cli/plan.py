"""`autan plan fit | models | hardware`: what capacity planning knows, and how well its cost model meets measurements."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.catalog import loader
from configs.catalog.hf_config import read_hf_config
from orchestrator.cli.output import print_json, print_table, stdout
from orchestrator.costs import sizes
from orchestrator.costs.constants import Constant, dump, refitted, shipped_table
from protos.contract.errors import ConfigError

if TYPE_CHECKING:
    from configs.schema.model_description import ModelDescription
    from orchestrator.costs.accuracy import Errors

app = typer.Typer(help="Capacity planning.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("models")
def models(
    config: Annotated[list[Path] | None, typer.Option("--config", help="Also a config.json of Hugging Face.")] = None,
    as_json: Json = False,
) -> None:
    """Lists the models that can be planned for, with their counts: parameters, weights, cache."""
    described = [*loader.models().values(), *(read_hf_config(path) for path in config or [])]
    rows = [_model_row(model) for model in described]
    if as_json:
        print_json(rows)
        return
    columns = ("model", "total", "active", "format", "weights GB", "KV B/token", "state MB", "context")
    print_table(
        columns,
        [
            (
                row["name"],
                f"{row['total_params'] / 1e9:.2f} B",
                f"{row['active_params'] / 1e9:.2f} B",
                row["format"],
                f"{row['weight_bytes'] / 1e9:.1f}",
                row["kv_bytes_per_token"],
                f"{row['state_bytes'] / 1e6:.0f}",
                row["context_tokens"],
            )
            for row in rows
        ],
    )


@app.command("hardware")
def hardware(as_json: Json = False) -> None:
    """Lists the GPUs that can be planned for: peaks, what kernels achieve of them, prices. --json adds the sources."""
    gpus = loader.hardware().values()
    if as_json:
        print_json([gpu.model_dump(mode="json", exclude_none=True) for gpu in gpus])
        return
    columns = ("GPU", "bf16 TF", "fp8 TF", "fp4 TF", "GiB", "TB/s", "link GB/s", "NIC Gb/s", "$/h")
    print_table(
        columns,
        [
            (
                gpu.name,
                f"{gpu.peaks.bf16_tflops.value:g}",
                f"{gpu.peaks.fp8_tflops.value:g}" if gpu.peaks.fp8_tflops else "-",
                f"{gpu.peaks.fp4_tflops.value:g}" if gpu.peaks.fp4_tflops else "-",
                f"{gpu.peaks.memory_gib.value:g}",
                f"{gpu.peaks.memory_tb_per_s.value:g}",
                f"{gpu.peaks.link_gb_per_s.value:g}",
                f"{gpu.peaks.nic_gbit_per_s.value:g}",
                f"{gpu.price.default_usd_per_hour:g} ({gpu.price.low:g}-{gpu.price.high:g})",
            )
            for gpu in gpus
        ],
    )


@app.command("fit")
def fit(
    csv: Annotated[Path, typer.Argument(metavar="CSV", help="Measured serving points.")],
    leave_out: Annotated[
        bool,
        typer.Option(
            "--leave-out/--no-leave-out", help="Also predict each model from a fit without it (some ten seconds more)."
        ),
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Write the table with the fitted values to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Fits the constants of the cost model to measurements and says how far they explain them."""
    from orchestrator.costs import accuracy
    from orchestrator.costs.constants import Constants
    from orchestrator.costs.fit import fit as fit_constants
    from orchestrator.costs.points import read_points

    points = read_points(csv)
    table = shipped_table()
    fitted = fit_constants(points, table)
    found = refitted(table, fitted.values, f"fitted to {len(points)} points of {csv.name}")
    if out is not None:
        try:
            out.write_text(dump(found), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written: {error.strerror}; give another --out") from error
    reports = {"fitted": accuracy.predicted(points, Constants(fitted.values))}
    if leave_out:
        reports["each model left out"] = accuracy.leaving_one_out(points, table)
    beyond = accuracy.beyond_kernels(points)
    summaries = {name: accuracy.summary(report, beyond) for name, report in reports.items()}
    if as_json:
        print_json(
            {
                "points": len(points),
                "beyond_kernels": [points[index].name for index in beyond],
                "loss": {"before": fitted.loss_before, "after": fitted.loss_after, "rounds": fitted.rounds},
                "constants": {name: constant.model_dump(mode="json") for name, constant in found.constants.items()},
                "errors": {
                    name: {part: [asdict(row) for row in rows] for part, rows in parts.items()}
                    for name, parts in summaries.items()
                },
            }
        )
        return
    print_table(
        ("constant", "value", "before", "low", "high", "meaning"), [_constant_row(*item) for item in found.constants.items()]
    )
    for name, parts in summaries.items():
        print_table(
            _ERROR_COLUMNS, [_error_row(row) for rows in parts.values() for row in rows], title=f"\n{name}, errors in %"
        )
    stdout.print(f"\n{len(beyond)} of {len(points)} points are faster than every kernel together; see --json for their names")


_ERROR_COLUMNS = ("points", "count", "TPOT MAPE", "median", "bias", "TTFT MAPE", "median", "bias")


def _error_row(row: Errors) -> tuple[object, ...]:
    sizes_and_biases = (row.tpot_mape, row.tpot_median, row.tpot_bias, row.ttft_mape, row.ttft_median, row.ttft_bias)
    shown = [f"{100 * value:+.0f}" if index % 3 == 2 else f"{100 * value:.1f}" for index, value in enumerate(sizes_and_biases)]
    return (row.label, row.points, *shown)


def _constant_row(name: str, constant: Constant) -> tuple[object, ...]:
    numbers = (constant.value, constant.prior, constant.low, constant.high)
    return (name, *(f"{number:.4g}" for number in numbers), constant.meaning)


def _model_row(model: ModelDescription) -> dict[str, Any]:
    counts = sizes.count(model)
    return {
        "name": model.name,
        "title": model.title,
        "total_params": counts.total,
        "active_params": sizes.active(model),
        "format": model.default_format,
        "weight_bytes": sizes.weight_bytes(model, model.default_format),
        "kv_bytes_per_token": sizes.kv_bytes_per_token(model),
        "state_bytes": sizes.state_bytes(model),
        "context_tokens": model.context_tokens,
        "source": model.source,
    }
