"""Checkpoint folders in the safetensors format: which tensors they hold, loading them, and their digest."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from protos.contract.errors import ModelError

Shapes = dict[str, tuple[int, ...]]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_RENAMED = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
# The text decoder needs neither the image encoder nor buffers that old exporters saved.
_IGNORED_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
_DTYPES = ("F32", "BF16", "F16")
_SHOWN_PROBLEMS = 12
_SAMPLES, _SAMPLE_BYTES = 256, 4096


class Checkpoint:
    """The tensors of one open checkpoint, under their names without a wrapper's prefix."""

    def __init__(self, places: dict[str, tuple[Any, str]], dtype: torch.dtype, device: torch.device) -> None:
        self._places = places
        self._dtype = dtype
        self._device = device

    def take(self, name: str) -> Tensor:
        """One tensor in the engine's dtype on its device."""
        file, stored_name = self._places[name]
        tensor: Tensor = file.get_tensor(stored_name)
        return tensor.to(device=self._device, dtype=self._dtype)


def shard_paths(model_dir: Path) -> list[Path]:
    """The weight files in a fixed order. Raises ModelError when there are none or the index names a missing one."""
    index = model_dir / _INDEX
    if not index.is_file():
        single = model_dir / _SINGLE
        if not single.is_file():
            raise ModelError(f"{model_dir}: has no weights (neither {_SINGLE} nor {_INDEX}); copy the whole checkpoint folder")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is no index of safetensors shards ({error!r}); restore the file") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: {name!r} is no file name; restore the file")
        if not (model_dir / name).is_file():
            raise ModelError(f"{model_dir / name}: missing, but {_INDEX} names it; copy the whole checkpoint folder")
    return [model_dir / name for name in names]


@contextmanager
def open_checkpoint(model_dir: Path, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Iterator[Checkpoint]:
    """Opens the shards for reading. Raises ModelError, before anything is loaded, that names every tensor at fault."""
    with ExitStack() as stack:
        places: dict[str, tuple[Any, str]] = {}
        problems: list[str] = []
        for path in shard_paths(model_dir):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: is no readable safetensors file ({error}); copy it again") from error
            for stored_name in sorted(file.keys()):
                name = _plain_name(stored_name)
                if name is None:
                    continue
                if name in places:
                    problems.append(f"{name} occurs twice")
                places[name] = (file, stored_name)
        problems += _compare(places, shapes)
        if problems:
            shown = "; ".join(problems[:_SHOWN_PROBLEMS])
            more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
            raise ModelError(f"{model_dir}: the tensors do not fit config.json: {shown}{more}")
        yield Checkpoint(places, dtype, device)


def _plain_name(stored_name: str) -> str | None:
    if stored_name.startswith(_IGNORED_PREFIXES) or stored_name.endswith(_IGNORED_SUFFIXES):
        return None
    for prefix, replacement in _RENAMED:
        if stored_name.startswith(prefix):
            return replacement + stored_name[len(prefix) :]
    return stored_name


def _compare(places: dict[str, tuple[Any, str]], shapes: Shapes) -> list[str]:
    problems = [f"{name} is missing" for name in shapes if name not in places]
    for name, (file, stored_name) in places.items():
        if name == "lm_head.weight" and name not in shapes:
            # Some exporters write the tied head a second time.
            if not torch.equal(file.get_tensor(stored_name), _stored(places, "model.embed_tokens.weight")):
                problems.append("lm_head.weight differs from model.embed_tokens.weight though tie_word_embeddings is true")
            continue
        if name not in shapes:
            problems.append(f"{name} is not part of the model")
            continue
        stored = file.get_slice(stored_name)
        if tuple(stored.get_shape()) != shapes[name]:
            problems.append(f"{name} has shape {list(stored.get_shape())} instead of {list(shapes[name])}")
        if stored.get_dtype() not in _DTYPES:
            problems.append(f"{name} has dtype {stored.get_dtype()}, not one of {', '.join(_DTYPES)}")
    return problems


def _stored(places: dict[str, tuple[Any, str]], name: str) -> Tensor:
    if name not in places:
        return torch.empty(0)
    file, stored_name = places[name]
    tensor: Tensor = file.get_tensor(stored_name)
    return tensor


def weights_digest(model_dir: Path) -> str:
    """Names the weights: xxh3-128 over sizes, headers and strided samples of all shards; takes milliseconds.

    Two folders with equal shards have equal digests wherever they lie. It tells checkpoints apart, it is no proof
    against tampering.
    """
    digest = xxhash.xxh3_128()
    for path in shard_paths(model_dir):
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(8)
                header_bytes = min(int.from_bytes(prefix, "little"), max(size - 8, 0))
                digest.update(size.to_bytes(8, "little") + prefix)
                digest.update(file.read(header_bytes))
                stride = max(_SAMPLE_BYTES, (size - 8 - header_bytes) // _SAMPLES)
                for offset in range(8 + header_bytes, size, stride):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return str(digest.hexdigest())


def check_checkpoint(model_dir: Path, shapes: Shapes) -> int:
    """The number of parameters, when the tensors fit. Raises ModelError as `open_checkpoint` does; loads nothing."""
    with open_checkpoint(model_dir, shapes, torch.float32, torch.device("cpu")):
        return sum(math.prod(shape) for shape in shapes.values())
