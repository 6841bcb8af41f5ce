"""Writing a checkpoint again with its linear layers in fewer bits; everything else stays as it is stored."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.native_params import HF_INDEX, NATIVE_PARAMS, layout_of_folder
from protos.contract.errors import ModelError
from workers.engines.torch.config import parse_config, read_raw_config
from workers.engines.torch.load_progress import Progress, silent
from workers.engines.torch.registry import shapes_of
from workers.engines.torch.stored_blocks import WHOLE, block_of
from workers.engines.torch.stored_tensors import (
    NATIVE_INDEX,
    Piece,
    Shards,
    list_entries,
    open_shard,
    shard_paths,
    stored_as,
)
from workers.engines.torch.tensor_names import is_of_image_encoder
from workers.engines.torch.tiny_files import Encoding, encode_weight, fits, is_quantised, quantization_config
from workers.engines.torch.tokenizer_files import write_json
from workers.engines.torch.weights import check_checkpoint

TARGETS: tuple[Encoding, ...] = ("int8", "int4", "fp8")


def quantise(source: Path, out_dir: Path, encoding: Encoding, progress: Progress = silent) -> Path:
    """Writes the checkpoint in `source` to `out_dir`, file by file; returns `out_dir`.

    Each file of weights becomes one of the same name, and memory holds one of them and one decoded matrix. A weight whose
    width no group of the format divides stays as it is stored. `out_dir` appears whole or not at all. Calls
    progress("quantise", bytes read, bytes in all). Raises ModelError when `out_dir` exists or the source is unusable.
    """
    if out_dir.exists():
        raise ModelError(f"{out_dir}: exists already; give a new folder or remove this one")
    raw, where = read_raw_config(source)
    shapes = shapes_of(parse_config(raw, where))
    check_checkpoint(source, shapes)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        _write_shards(source, staging, encoding, progress)
        _write_configuration(source, staging, encoding)
        _copy_other_files(source, staging)
        check_checkpoint(staging, shapes)
        staging.chmod(0o755)
        staging.rename(out_dir)
    except OSError as error:
        place = error.filename or out_dir
        raise ModelError(f"{place}: {error.strerror or error}; the copy needs room in {out_dir.parent}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out_dir


def _write_shards(source: Path, staging: Path, encoding: Encoding, progress: Progress) -> None:
    native, paths = layout_of_folder(source) == "native", shard_paths(source)
    copier = _Copier(source, encoding, progress)
    weight_map: dict[str, str] = {}
    try:
        for path in paths:
            tensors = copier.content(path)
            save_file(tensors, staging / path.name, metadata={"format": "pt"})
            (staging / path.name).chmod(0o644)
            weight_map |= dict.fromkeys(tensors, path.name)
    finally:
        copier.close()
    if len(paths) > 1:
        size = sum((staging / path.name).stat().st_size for path in paths)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(staging / (NATIVE_INDEX if native else HF_INDEX), index)


class _Copier:
    """What each file of a checkpoint holds in the new format, by the names of its layout."""

    def __init__(self, source: Path, encoding: Encoding, progress: Progress) -> None:
        self._layout = layout_of_folder(source)
        self._encoding = encoding
        self._progress = progress
        self._entries, _ = list_entries(source)
        self._by_stored_name = {entry.stored_name: name for name, entry in self._entries.items()}
        self._shards = Shards()
        self._done_bytes = 0
        self._total_bytes = sum(entry.stored_bytes for entry in self._entries.values())

    def close(self) -> None:
        """Unmaps the files."""
        self._shards.close()

    def content(self, path: Path) -> dict[str, Tensor]:
        """The tensors of the file that takes the place of this one."""
        with open_shard(path) as file:
            stored_names = sorted(file.keys())
            tensors = {name: file.get_tensor(name).clone() for name in stored_names if is_of_image_encoder(name)}
        for stored_name in stored_names:
            name = self._by_stored_name.get(stored_name)
            if name is None:
                continue
            weight, suffix = _split_suffix(name)
            kind, _ = stored_as(weight, self._entries)
            if not self._changes(weight, kind):
                tensors[stored_name] = self._shards.view(self._entries[name]).clone()
            elif suffix in ("", "_packed"):
                tensors |= self._encoded(weight, stored_name.removesuffix("_packed"))
            self._done_bytes += self._entries[name].stored_bytes
            self._progress("quantise", self._done_bytes, self._total_bytes)
        return tensors

    def _changes(self, weight: str, kind: str) -> bool:
        if not is_quantised(weight, self._encoding) or kind == self._encoding:
            return False
        width = self._piece(weight).width
        return fits(width, self._encoding)

    def _piece(self, weight: str) -> Piece:
        kind, names = stored_as(weight, self._entries)
        return Piece(kind, tuple(self._entries[name] for name in names))

    def _encoded(self, weight: str, stored_name: str) -> dict[str, Tensor]:
        piece = self._piece(weight)
        shape = piece.entries[0].shape
        if len(shape) == 2:
            return self._renamed(encode_weight(stored_name, self._matrix(piece, None), self._encoding))
        stacks: dict[str, Tensor] = {}
        for index in range(shape[0]):
            for name, part in encode_weight(stored_name, self._matrix(piece, index), self._encoding).items():
                if index == 0:
                    # A scale of a whole matrix is [1, 1] in a stack.
                    stacks[name] = part.new_empty((shape[0], *(part.shape or (1, 1))))
                stacks[name][index] = part
        return self._renamed(stacks)

    def _matrix(self, piece: Piece, index: int | None) -> Tensor:
        block = block_of(piece, index, WHOLE, WHOLE)
        matrix = torch.empty((len(block.rows), len(block.columns)))
        block.decode(self._shards, matrix, 0)
        return matrix

    def _renamed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._layout == "hf":
            return tensors
        return {name.replace(".weight_scale_inv", ".qscale_weight"): tensor for name, tensor in tensors.items()}


def _split_suffix(name: str) -> tuple[str, str]:
    """The weight that a stored tensor belongs to, and what its name has besides."""
    for suffix in ("_packed", "_scale", "_scale_inv", "_global_scale"):
        if name.endswith((".weight" + suffix, "_proj" + suffix)):
            return name.removesuffix(suffix), suffix
    return name, ""


def _write_configuration(source: Path, staging: Path, encoding: Encoding) -> None:
    described = quantization_config(encoding) or {}
    if encoding == "fp8":
        described["activation_scheme"] = "dynamic"  # no activations have been seen that a static scale could come from
    if layout_of_folder(source) == "native":
        params = json.loads((source / NATIVE_PARAMS).read_bytes())
        write_json(staging / NATIVE_PARAMS, {**params, "quantization": described})
        return
    raw = json.loads((source / "config.json").read_bytes())
    if isinstance(raw.get("text_config"), dict):
        raw["text_config"].pop("quantization_config", None)
    write_json(staging / "config.json", {**raw, "quantization_config": described})


def _copy_other_files(source: Path, staging: Path) -> None:
    """Tokenizer, template and such; not weights, nor what describes the other copy of a folder that holds two."""
    for path in sorted(source.iterdir()):
        # The marker of an import vouches for the files that were imported.
        is_written = path.name in ("config.json", NATIVE_PARAMS, "import.json") or ".safetensors" in path.name
        if path.is_file() and not is_written and not path.name.startswith("."):
            shutil.copyfile(path, staging / path.name)
