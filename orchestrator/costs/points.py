"""Measured serving points as the fit reads them, from a CSV (columns: `orchestrator/costs/points.py`, COLUMNS)."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.catalog.loader import hardware_named, model_named
from configs.schema.hardware import Hardware
from configs.schema.model_description import KvFormat, ModelDescription, WeightFormat
from orchestrator.costs.layout import Layout
from protos.contract.errors import ConfigError

MAX_ROWS = 1_000_000
# InferenceMAX's benchmark draws lengths from 0.8 to 1.0 of the nominal ones; its rows are called ..._cfgN or begin with a date.
SPREAD_NAME = re.compile(r"_cfg\d+$|^\d{4}_\d{2}_\d{2}_")
SPREAD_MEAN = 0.9
NAMED_PRECISION = re.compile(r"-(fp8|nvfp4|fp4|int4|int8)(?:-v\d)?$")
COLUMNS = (
    "id", "backend", "model_path", "system", "precision", "mode", "isl", "osl", "conc",
    "tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size",
    "silicon_ttft_ms", "silicon_tpot_ms",
)  # fmt: skip
SPLIT_COLUMNS = ("num_workers", "tp_size", "attention_dp_size", "moe_ep_size")  # after prefill_ and decode_


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Equal instances of one role."""

    instances: int
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """One measurement: a deployment, a load, and the mean times to first token and per token."""

    name: str
    backend: str
    model: ModelDescription
    gpu: Hardware
    prefill: Role
    decode: Role
    split: bool
    prompt_tokens: float  # means
    output_tokens: float
    spread: bool  # lengths differ from request to request
    concurrency: float
    ttft_s: float
    tpot_s: float
    saturated: bool

    @property
    def group(self) -> str:
        """What weighs the same in the fit as every other group: a model on a GPU in one engine and mode."""
        return f"{self.model.name} {self.gpu.name} {'split' if self.split else 'one'} {self.backend}"


def read_points(path: Path) -> list[MeasuredPoint]:
    """Every row that names a concurrency and both times. Raises ConfigError that names file and line of a bad row."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = sorted(set(COLUMNS) - set(reader.fieldnames or ()))
            if missing:
                raise ConfigError(f"{path}: column {', '.join(missing)} is missing; the header must name {', '.join(COLUMNS)}")
            return _points(path, reader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text (byte {error.start})") from error


def _points(path: Path, rows: Iterable[dict[str, str]]) -> list[MeasuredPoint]:
    found = []
    for line, row in enumerate(rows, start=2):
        if line > MAX_ROWS:
            raise ConfigError(f"{path}: more than {MAX_ROWS} rows")
        if not (row["conc"] and row["silicon_ttft_ms"] and row["silicon_tpot_ms"]):
            continue
        try:
            found.append(_point(row))
        except (ValueError, TypeError, AssertionError, ConfigError) as error:
            raise ConfigError(f"{path}:{line}: {error}") from error
    if not found:
        raise ConfigError(f"{path}: no row has conc, silicon_ttft_ms and silicon_tpot_ms")
    return found


def _point(row: dict[str, str]) -> MeasuredPoint:
    model, gpu = model_named(row["model_path"]), hardware_named(row["system"])
    weights = _weights(model, row["precision"] or _named_precision(row["model_path"]))
    kv = _kv(model, weights)
    split = row["mode"] == "disagg"
    if split:
        prefill, decode = (_split_role(row, role, weights, kv) for role in ("prefill", "decode"))
    else:
        prefill = decode = _whole_role(row, weights, kv)
    spread = SPREAD_NAME.search(row["id"]) is not None
    length = SPREAD_MEAN if spread else 1.0
    return MeasuredPoint(
        name=row["id"],
        backend=row["backend"],
        model=model,
        gpu=gpu,
        prefill=prefill,
        decode=decode,
        split=split,
        prompt_tokens=_size(row, "isl") * length,
        output_tokens=_size(row, "osl") * length,
        spread=spread,
        concurrency=_positive(row, "conc"),
        ttft_s=_positive(row, "silicon_ttft_ms") / 1e3,
        tpot_s=_positive(row, "silicon_tpot_ms") / 1e3,
        saturated=row.get("queue_limited", "") == "True",
    )


def _weights(model: ModelDescription, precision: str) -> WeightFormat:
    """Of the precision a row names; the model's own where it names none, or where its experts have four bits anyway."""
    if model.default_format == "mxfp4" or precision == "":
        return model.default_format
    known: dict[str, WeightFormat] = {
        "fp8": "fp8",
        "fp4": "nvfp4",
        "nvfp4": "nvfp4",
        "bf16": "bf16",
        "int8": "int8",
        "int4": "int4",
    }
    if precision not in known:
        raise ConfigError(f"precision {precision!r} is not known (known: {', '.join(known)})")
    return known[precision]


def _named_precision(model_path: str) -> str:
    """What the name of a checkpoint says of its weights; empty when it says nothing."""
    said = NAMED_PRECISION.search(model_path.lower())
    return "" if said is None else said[1]


def _kv(model: ModelDescription, weights: WeightFormat) -> KvFormat:
    """Checkpoints quantised by GPU vendors carry an fp8 cache; models published in fp8 or mxfp4 keep it in bf16."""
    return "bf16" if weights == model.default_format else "fp8"


def _whole_role(row: dict[str, str], weights: WeightFormat, kv: KvFormat) -> Role:
    tensor, data, expert = _size(row, "tp_size"), _size(row, "attention_dp_size"), _size(row, "moe_ep_size")
    expert_tensor = _size(row, "moe_tp_size")
    if expert == expert_tensor > 1 and max(tensor, data) == expert * expert:
        # Benchmarks that name tensor and expert size of the same n GPUs are listed as n x n GPUs.
        tensor, data = (expert, 1) if tensor > 1 else (1, expert)
    return Role(
        instances=1, layout=Layout(tensor=tensor, data=data, expert=_divisor(tensor * data, expert), weights=weights, kv=kv)
    )


def _split_role(row: dict[str, str], role: str, weights: WeightFormat, kv: KvFormat) -> Role:
    instances, tensor, data, expert = (_size(row, f"{role}_{column}") for column in SPLIT_COLUMNS)
    layout = Layout(tensor=tensor, data=data, expert=_divisor(tensor * data, expert), weights=weights, kv=kv)
    return Role(instances=instances, layout=layout)


def _divisor(gpus: int, expert: int) -> int:
    return expert if gpus % expert == 0 else gpus


def _size(row: dict[str, str], column: str) -> int:
    """A count; empty and 0 mean one."""
    value = float(row[column] or 1)
    if value != int(value) or not 0 <= value <= 1e7:
        raise ConfigError(f"{column} {row[column]!r} is no count")
    return max(1, int(value))


def _positive(row: dict[str, str], column: str) -> float:
    value = float(row[column])
    if not 0 < value < 1e9:
        raise ConfigError(f"{column} {row[column]!r} is no positive number")
    return value


def groups(points: Sequence[MeasuredPoint]) -> list[str]:
    """The groups in order of first appearance."""
    return list(dict.fromkeys(point.group for point in points))
