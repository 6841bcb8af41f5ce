"""Loading the tensors of a checkpoint folder, whatever its layout and number format, and naming its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from protos.contract.errors import ModelError
from workers.engines.torch.layers.experts import Experts, PlainExperts
from workers.engines.torch.layers.linear import Linear, PlainLinear
from workers.engines.torch.stored_tensors import Entry, Piece, Shards, list_entries, place_tensors, shard_paths
from workers.engines.torch.tensor_names import Shape

__all__ = [
    "WHOLE",
    "Checkpoint",
    "Progress",
    "Shapes",
    "check_checkpoint",
    "open_checkpoint",
    "shard_paths",
    "silent",
    "weights_digest",
]

Shapes = dict[str, Shape]
Progress = Callable[[str, int, int], None]

WHOLE = slice(None)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SHOWN_PROBLEMS = 12
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class Checkpoint:
    """The tensors of one open checkpoint, under their names without a wrapper's prefix.

    Host memory stays below what has been taken plus one shard: tensors are copied out of the mapped file one by one,
    and no tensor keeps a file mapped.
    """

    def __init__(
        self,
        shards: Shards,
        places: Mapping[str, list[Piece]],
        shapes: Shapes,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress = silent,
    ) -> None:
        self._shards = shards
        self._places = places
        self._shapes = shapes
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._done_bytes = 0
        self._total_bytes = sum(piece.stored_bytes for pieces in places.values() for piece in pieces)

    def linear(self, *names: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Linear:
        """The weights fused by rows; of each only these rows and columns."""
        return self._linear([self.take(name)[rows, columns] for name in names])

    def fused(self, parts: Sequence[tuple[str, slice]]) -> Linear:
        """Some rows of each of several weights, one below the other."""
        return self._linear([self.take(name)[rows] for name, rows in parts])

    def _linear(self, parts: list[Tensor]) -> Linear:
        return PlainLinear(torch.cat(parts) if len(parts) > 1 else parts[0].contiguous())

    def experts(self, prefix: str, held: slice) -> Experts:
        """The routed experts `held` of one layer."""
        gate_up, down = (self.take(prefix + name)[held].contiguous() for name in ("gate_up_proj", "down_proj"))
        return PlainExperts(gate_up, down, held.start or 0)

    def take(self, name: str) -> Tensor:
        """One tensor in the engine's dtype on its device. Calls progress("weights", bytes done, bytes in all)."""
        pieces = self._places[name]
        if len(pieces) == 1 and pieces[0].expert is None:
            tensor = self._whole(name, pieces[0])
        else:
            tensor = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
            for piece in pieces:
                rows = self._shards.read(piece)
                assert piece.expert is not None
                tensor[piece.expert, piece.first_row : piece.first_row + rows.shape[0]] = rows.to(self._device)
        self._done_bytes += sum(piece.stored_bytes for piece in pieces)
        self._progress("weights", self._done_bytes, self._total_bytes)
        return tensor

    def _whole(self, name: str, piece: Piece) -> Tensor:
        shape = self._shapes[name]
        if piece.kind == "plain" or len(shape) < 3:
            return self._shards.read(piece).to(device=self._device, dtype=self._dtype, copy=True)
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        for index in range(shape[0]):
            tensor[index] = self._shards.read(piece, index).to(self._device)
        return tensor


@contextmanager
def open_checkpoint(
    model_dir: Path, shapes: Shapes, dtype: torch.dtype, device: torch.device, progress: Progress = silent
) -> Iterator[Checkpoint]:
    """Opens the shards for reading. Raises ModelError, before anything is loaded, that names every tensor at fault."""
    entries, problems = list_entries(model_dir)
    shards = Shards()
    try:
        if _HEAD in entries and _HEAD not in shapes:
            problems += _compare_tied(shards, entries)
        places, found = place_tensors(entries, shapes)
        problems += found
        if problems:
            shown = "; ".join(problems[:_SHOWN_PROBLEMS])
            more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
            raise ModelError(f"{model_dir}: the tensors do not fit the configuration: {shown}{more}")
        yield Checkpoint(shards, places, shapes, dtype, device, progress)
    finally:
        shards.close()


def _compare_tied(shards: Shards, entries: dict[str, Entry]) -> list[str]:
    """Some exporters write the tied head a second time; drops that copy from the entries when it is one."""
    head, embedding = entries.pop(_HEAD), entries.get(_EMBEDDING)
    if embedding is not None:
        first = shards.read(Piece("plain", (embedding,)))
        if torch.equal(first, shards.read(Piece("plain", (head,)))):
            return []
    return [f"{_HEAD} differs from {_EMBEDDING} though tie_word_embeddings is true"]


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
