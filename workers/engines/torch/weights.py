"""Loading the tensors of a checkpoint folder, whatever its layout and number format, and naming its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from protos.contract.errors import ModelError
from workers.engines.torch.layers.compressed_experts import CompressedExperts
from workers.engines.torch.layers.compressed_linear import COMPRESSED, StackedLinear
from workers.engines.torch.layers.experts import Experts, PlainExperts
from workers.engines.torch.layers.linear import Linear, PlainLinear
from workers.engines.torch.load_progress import LoadProgress, Progress, silent
from workers.engines.torch.number_formats import CHUNK_VALUES
from workers.engines.torch.stored_blocks import WHOLE, Block, block_of, empty_parts
from workers.engines.torch.stored_tensors import Entry, Piece, Shards, list_entries, place_tensors, shard_paths
from workers.engines.torch.tensor_names import Shape

__all__ = [
    "WHOLE",
    "Checkpoint",
    "Progress",
    "Shapes",
    "check_checkpoint",
    "check_values",
    "keeps_compressed",
    "open_checkpoint",
    "shard_paths",
    "silent",
    "weights_digest",
]

Shapes = dict[str, Shape]
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DECODED_SUFFIX = ".kv_b_proj.weight"  # small, and used as a plain tensor in both forms of latent attention
_SHOWN_PROBLEMS = 12
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def keeps_compressed(kind: str) -> bool:
    """Whether a linear layer of this stored format stays as it is stored in memory; the one place that decides.

    All formats of fewer bits do: where the device has no kernel for them, their layers decode a chunk of rows at a time.
    Embedding, router, norms and the latent heads (`DECODED_SUFFIX`) are used as plain tensors, so `take` decodes them; a head
    that is tied to a compressed embedding is kept beside it as it is stored.
    """
    return kind in COMPRESSED


class Checkpoint:
    """The tensors of one open checkpoint, under their names without a wrapper's prefix.

    Only the rows and columns asked for are read, in chunks, straight to where they stay. Host memory stays below what has been
    loaded plus one shard, the one whose file is mapped, plus a few decoded chunks.
    """

    def __init__(
        self,
        shards: Shards,
        places: Mapping[str, list[Piece]],
        shapes: Shapes,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress = silent,
        *,
        compressed: bool = True,
    ) -> None:
        self._shards = shards
        self._places = places
        self._shapes = shapes
        self._dtype = dtype
        self._device = device
        self._compressed = compressed
        self._loading = LoadProgress(places, progress)
        self._embedding: Tensor | None = None

    def linear(self, *names: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Linear:
        """The weights fused by rows; of each only these rows and columns."""
        return self._fused([(name, rows, columns) for name in names])

    def fused(self, parts: Sequence[tuple[str, slice]]) -> Linear:
        """Some rows of each of several weights, one below the other."""
        return self._fused([(name, rows, WHOLE) for name, rows in parts])

    def experts(self, prefix: str, held: slice) -> Experts:
        """The routed experts `held` of one layer."""
        names = (prefix + "gate_up_proj", prefix + "down_proj")
        gate_up, down = ([self._of_expert(name, expert) for expert in self._experts(name)[held]] for name in names)
        first = held.start or 0
        if any(self._keeps(blocks) for blocks in (*gate_up, *down)):
            loaded: Experts = CompressedExperts(
                [self._weight(blocks) for blocks in gate_up], [self._weight(blocks) for blocks in down], first
            )
        else:
            loaded = PlainExperts(self._stack(names[0], gate_up), self._stack(names[1], down), first)
        self._loading.done(*names)
        return loaded

    def take(self, name: str, rows: slice = WHOLE) -> Tensor:
        """One tensor, or these rows of it, in the engine's dtype on its device."""
        if len(self._shapes[name]) == 1:
            stored = self._shards.view(self._places[name][0].entries[0])[rows]
            tensor = stored.to(device=self._device, dtype=self._dtype, copy=True)
        elif len(self._shapes[name]) == 2:
            tensor = self._decoded([block_of(self._places[name][0], None, rows, WHOLE)])
        else:
            tensor = self._stack(name, [self._of_expert(name, expert) for expert in self._experts(name)[rows]])
        if name == _EMBEDDING and rows == WHOLE:
            self._embedding = tensor
        self._loading.done(name)
        return tensor

    def matrices(self, name: str) -> Iterator[Tensor]:
        """The tensor as `take` gives it, or of a stack of experts one after another."""
        if len(self._shapes[name]) < 3:
            yield self.take(name)
            return
        for expert in self._experts(name):
            yield self._decoded(self._of_expert(name, expert))
        self._loading.done(name)

    def _fused(self, parts: Sequence[tuple[str, slice, slice]]) -> Linear:
        names = [name for name, _, _ in parts]
        blocks = [block_of(self._places[name][0], None, rows, columns) for name, rows, columns in parts]
        if names == [_EMBEDDING] and self._embedding is not None and not self._keeps(blocks):
            return PlainLinear(self._embedding[parts[0][1], parts[0][2]].contiguous())
        weight = self._weight(blocks)
        self._loading.done(*names)
        return weight

    def _weight(self, blocks: list[Block]) -> Linear:
        """Blocks of equal width below each other."""
        if not self._keeps(blocks):
            return PlainLinear(self._decoded(blocks))
        if len({(block.kind, block.group, block.aligned) for block in blocks}) > 1:
            return StackedLinear([self._weight([block]) for block in blocks])
        parts = empty_parts(blocks[0], sum(len(block.rows) for block in blocks), self._device)
        first = 0
        for block in blocks:
            block.copy_parts(self._shards, parts, first)
            self._loading.advance(block.stored_bytes)
            first += len(block.rows)
        return COMPRESSED[blocks[0].kind](*parts)

    def _keeps(self, blocks: list[Block]) -> bool:
        return self._compressed and any(keeps_compressed(block.kind) and block.aligned for block in blocks)

    def _decoded(self, blocks: list[Block], target: Tensor | None = None) -> Tensor:
        if target is None:
            shape = (sum(len(block.rows) for block in blocks), len(blocks[0].columns))
            target = torch.empty(shape, dtype=self._dtype, device=self._device)
        first = 0
        for block in blocks:
            block.decode(self._shards, target, first)
            self._loading.advance(block.stored_bytes)
            first += len(block.rows)
        return target

    def _experts(self, name: str) -> range:
        return range(self._shapes[name][0])

    def _of_expert(self, name: str, expert: int) -> list[Block]:
        pieces = self._places[name]
        if pieces[0].expert is None:
            return [block_of(pieces[0], expert, WHOLE, WHOLE)]
        per_expert = len(pieces) // self._shapes[name][0]
        mine = pieces[expert * per_expert : (expert + 1) * per_expert]
        return [block_of(piece, None, WHOLE, WHOLE) for piece in mine]

    def _stack(self, name: str, stack: list[list[Block]]) -> Tensor:
        tensor = torch.empty((len(stack), *self._shapes[name][1:]), dtype=self._dtype, device=self._device)
        for place, blocks in zip(tensor, stack, strict=True):
            self._decoded(blocks, place)
        return tensor


@contextmanager
def open_checkpoint(
    model_dir: Path,
    shapes: Shapes,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = silent,
    *,
    compressed: bool = True,
) -> Iterator[Checkpoint]:
    """Opens the shards for reading. Raises ModelError, before anything is loaded, that names every tensor at fault.

    Without `compressed` every weight is decoded into the dtype while it is loaded.
    """
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
        yield Checkpoint(shards, places, shapes, dtype, device, progress, compressed=compressed)
    finally:
        shards.close()


def _compare_tied(shards: Shards, entries: dict[str, Entry]) -> list[str]:
    """Some exporters write the tied head a second time; drops that copy from the entries when it is one."""
    head, embedding = entries.pop(_HEAD), entries.get(_EMBEDDING)
    if embedding is not None and (embedding.shape, embedding.dtype) == (head.shape, head.dtype) and len(head.shape) == 2:
        rows = max(1, CHUNK_VALUES // max(head.shape[1], 1))
        runs = [slice(start, start + rows) for start in range(0, head.shape[0], rows)]
        if all(torch.equal(shards.view(embedding, run).clone(), shards.view(head, run)) for run in runs):
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


def check_values(model_dir: Path, shapes: Shapes, progress: Progress = silent) -> None:
    """Reads and decodes every tensor. Raises ModelError that names those that hold NaN or infinities."""
    with open_checkpoint(model_dir, shapes, torch.float32, torch.device("cpu"), progress, compressed=False) as checkpoint:
        broken = [name for name in shapes if not all(bool(part.isfinite().all()) for part in checkpoint.matrices(name))]
    if broken:
        shown = ", ".join(broken[:_SHOWN_PROBLEMS]) + (" and more" if len(broken) > _SHOWN_PROBLEMS else "")
        raise ModelError(f"{model_dir}: not finite: {shown}; copy these files again")
