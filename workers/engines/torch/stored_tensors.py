"""Safetensors shards of a checkpoint folder, and where and how each tensor of a model is stored in them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.native_params import HF_INDEX, HF_SINGLE, NATIVE_GLOB, layout_of_folder
from protos.contract.errors import ModelError
from workers.engines.torch.number_formats import INT4_GROUPS, NVFP4_BLOCK
from workers.engines.torch.tensor_names import Shape, expert_parts, is_activation_scale, plain_name

NATIVE_INDEX = "consolidated.safetensors.index.json"
_PLAIN_DTYPES = ("F32", "BF16", "F16")
_BITS = {"F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "I8": 8, "U8": 8}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. `dtype` is the format's own word."""

    path: Path
    stored_name: str
    shape: Shape
    dtype: str

    @property
    def stored_bytes(self) -> int:
        """Bytes of its values in the file."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 8) // 8


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, or the rows of one expert in it: the tensors that hold it, values first, and their format.

    `kind` is "plain", "fp8", "nvfp4", "int8" or "int4".
    """

    kind: str
    entries: tuple[Entry, ...]
    expert: int | None = None
    first_row: int = 0

    @property
    def width(self) -> int:
        """Columns of the matrix."""
        return self.entries[0].shape[-1] * (2 if self.kind in ("nvfp4", "int4") else 1)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the files."""
        return sum(entry.stored_bytes for entry in self.entries)


class Shards:
    """Reads tensors out of several files. One file is mapped at a time, so no more than one stays in memory."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None

    def view(self, entry: Entry, *where: int | slice) -> Tensor:
        """The part of a tensor at these indices, as stored; the pages that hold nothing of it are not read.

        It is a view of the mapped file: copy what is kept, or the file stays in memory.
        """
        if self._path != entry.path:
            self.close()
            self._file = open_shard(entry.path).__enter__()
            self._path = entry.path
        tensor: Tensor
        tensor = self._file.get_slice(entry.stored_name)[where] if where else self._file.get_tensor(entry.stored_name)
        return tensor

    def close(self) -> None:
        """Unmaps the file. Idempotent."""
        if self._file is not None:
            self._file.__exit__(None, None, None)
        self._path = self._file = None


def open_shard(path: Path) -> Any:
    """The file, mapped, as a context manager. Raises ModelError when it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: is no readable safetensors file ({error}); copy it again") from error


def shard_paths(model_dir: Path) -> list[Path]:
    """The weight files in a fixed order. Raises ModelError when there are none or the index names a missing one."""
    native = layout_of_folder(model_dir) == "native"
    index = model_dir / (NATIVE_INDEX if native else HF_INDEX)
    if not index.is_file():
        found = sorted(model_dir.glob(NATIVE_GLOB)) if native else [model_dir / HF_SINGLE]
        if not found or not found[0].is_file():
            wanted = NATIVE_GLOB if native else HF_SINGLE
            raise ModelError(
                f"{model_dir}: has no weights (neither {wanted} nor {index.name}); copy the whole checkpoint folder"
            )
        return found
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is no index of safetensors shards ({error!r}); restore the file") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: {name!r} is no file name; restore the file")
        if not (model_dir / name).is_file():
            raise ModelError(f"{model_dir / name}: missing, but {index.name} names it; copy the whole checkpoint folder")
    return [model_dir / name for name in names]


def list_entries(model_dir: Path) -> tuple[dict[str, Entry], list[str]]:
    """Every stored tensor that concerns the decoder, by its plain name, and the names that occur twice."""
    layout = layout_of_folder(model_dir)
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    for path in shard_paths(model_dir):
        with open_shard(path) as file:
            for stored_name in sorted(file.keys()):
                name = plain_name(stored_name, layout)
                if name is None:
                    continue
                if name in entries:
                    problems.append(f"{name} occurs twice")
                stored = file.get_slice(stored_name)
                entries[name] = Entry(path, stored_name, tuple(stored.get_shape()), stored.get_dtype())
    return entries, problems


def count_activation_scales(model_dir: Path) -> int:
    """How many static scales of activations the files hold; the loader passes them over."""
    count = 0
    for path in shard_paths(model_dir):
        with open_shard(path) as file:
            count += sum(map(is_activation_scale, file.keys()))
    return count


def place_tensors(entries: Mapping[str, Entry], shapes: Mapping[str, Shape]) -> tuple[dict[str, list[Piece]], list[str]]:
    """How each tensor of the model is read, and what is missing, extra or of a wrong shape or dtype."""
    places: dict[str, list[Piece]] = {}
    problems: list[str] = []
    used: set[str] = set()
    split = {name.split(".experts.")[0] for name in entries if ".experts." in name and "_proj.weight" in name}
    for name, shape in shapes.items():
        parts = expert_parts(name, shape) if name.split(".experts.")[0] in split else []
        wanted: list[tuple[str, Shape, int | None, int]] = [*parts] or [(name, shape, None, 0)]
        places[name] = []
        for part, part_shape, expert, first_row in wanted:
            kind, names = stored_as(part, entries)
            used.update(names)
            found = [f"{part} is missing"] if not names else list(_faults(part, part_shape, kind, [entries[n] for n in names]))
            problems += found
            if not found:
                places[name].append(Piece(kind, tuple(entries[n] for n in names), expert, first_row))
    problems += [f"{name} is not part of the model" for name in entries if name not in used]
    return places, problems


def stored_as(name: str, entries: Mapping[str, Entry]) -> tuple[str, list[str]]:
    """The format of a weight, and the names of the tensors that hold it, values first; none when it is missing."""
    packed, scale, inverse, top = (name + suffix for suffix in ("_packed", "_scale", "_scale_inv", "_global_scale"))
    if name not in entries and packed in entries:
        kind, names = ("nvfp4", [packed, scale, top]) if top in entries else ("int4", [packed, scale])
        return kind, [name for name in names if name in entries]
    if name not in entries:
        return "plain", []
    if entries[name].dtype == "F8_E4M3":
        return "fp8", [name, *([inverse] if inverse in entries else [scale] if scale in entries else [])]
    if entries[name].dtype == "I8":
        return "int8", [name, *([scale] if scale in entries else [])]
    return "plain", [name]


def _faults(name: str, shape: Shape, kind: str, found: list[Entry]) -> Iterator[str]:
    """What keeps these tensors from being the weight `name` of this shape."""
    values = found[0]
    halved = (*shape[:-1], shape[-1] // 2)
    wanted = halved if kind in ("nvfp4", "int4") else shape
    if values.shape != wanted:
        yield f"{name} has shape {list(values.shape)} instead of {list(wanted)}"
        return
    if kind == "plain":
        if values.dtype not in _PLAIN_DTYPES:
            yield f"{name} has dtype {values.dtype}, not one of {', '.join(_PLAIN_DTYPES)}"
        return
    if len(shape) < 2:
        yield f"{name} has dtype {values.dtype}, which is for matrices only"
        return
    if len(found) != (3 if kind == "nvfp4" else 2):
        yield f"{name} is stored as {kind} and its scale is missing"
        return
    if kind in ("nvfp4", "int4") and values.dtype != "U8":
        yield f"{name}_packed has dtype {values.dtype} instead of U8"
    yield from _scale_faults(name, shape, kind, found[1:])


def _scale_faults(name: str, shape: Shape, kind: str, scales: list[Entry]) -> Iterator[str]:
    per_matrix = math.prod(shape[:-2])  # scales of a whole matrix: one, or one per expert of a fused tensor
    scale = scales[0]
    allowed: list[Shape] = []
    if kind == "int8":
        allowed = [shape[:-1]]
    elif kind == "nvfp4":
        allowed = [(*shape[:-1], shape[-1] // NVFP4_BLOCK)]
    elif kind == "int4":
        allowed = [(*shape[:-1], shape[-1] // group) for group in INT4_GROUPS if shape[-1] % group == 0]
    if (scale.shape not in allowed) if allowed or kind == "int4" else (math.prod(scale.shape) != per_matrix):
        yield f"{name}: its scale has shape {list(scale.shape)}, which does not fit {kind} of {list(shape)}"
    if scale.dtype not in (("F8_E4M3",) if kind == "nvfp4" else _PLAIN_DTYPES):
        yield f"{name}: its scale has dtype {scale.dtype}"
    if kind == "nvfp4" and (math.prod(scales[1].shape) != per_matrix or scales[1].dtype not in _PLAIN_DTYPES):
        yield f"{name}: its global scale has shape {list(scales[1].shape)} and dtype {scales[1].dtype}"
