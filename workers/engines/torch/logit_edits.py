"""What a request changes of its logits before a token is drawn: grammar, barred stop tokens, bias, penalties. In this order.

Everything is gathered on the host for the whole batch, goes to the device in a few uploads, and touches only the entries
that it names; only a grammar touches whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.batching.runner import Slice
from workers.batching.token_counts import TokenCounts

Ids = npt.NDArray[np.int64]


def has_barred(piece: Slice) -> bool:
    """True while stop tokens are barred."""
    return piece.output_index < piece.sampling.min_tokens and bool(piece.sampling.stop_token_ids)


def is_edited(piece: Slice) -> bool:
    """True when the logits of the slice are not drawn from as they are."""
    rule = piece.sampling
    return piece.allowed is not None or rule.has_penalties or bool(rule.logit_bias) or has_barred(piece)


def edit_logits(logits: Tensor, pieces: Sequence[Slice], masks: dict[int, memoryview]) -> None:
    """Edits contiguous fp32 logits `[S, V]` in place. `masks`: the packed grammar masks by row.

    A row that nothing is left of is -inf throughout. Barring that would leave nothing does not happen.
    """
    if masks:
        _mask(logits, masks)
    if any(has_barred(piece) for piece in pieces):
        _bar(logits, pieces)
    if any(piece.sampling.logit_bias for piece in pieces):
        _add_bias(logits, pieces)
    if any(piece.sampling.has_penalties for piece in pieces):
        _penalise(logits, pieces)


def upload(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A host array on the device, without waiting for the device."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _mask(logits: Tensor, masks: dict[int, memoryview]) -> None:
    device, vocab_size = logits.device, logits.shape[1]
    packed = np.stack([np.frombuffer(mask, dtype=np.uint8) for mask in masks.values()])
    places = upload(np.arange(8, dtype=np.uint8), device)
    bits = ((upload(packed, device)[:, :, None] >> places) & 1).flatten(1)[:, :vocab_size]
    if len(masks) == len(logits):
        logits.masked_fill_(bits == 0, -torch.inf)
        return
    rows = upload(np.array(list(masks), dtype=np.int64), device)
    logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(bits == 0, -torch.inf))


def _bar(logits: Tensor, pieces: Sequence[Slice]) -> None:
    vocab_size = logits.shape[1]
    rows: list[int] = []
    ids: list[int] = []
    for row, piece in enumerate(pieces):
        if has_barred(piece):
            barred = [token_id for token_id in piece.sampling.stop_token_ids if 0 <= token_id < vocab_size]
            ids += barred
            rows += [row] * len(barred)
    row_of, places = (upload(a, logits.device) for a in _flat(rows, ids, vocab_size))
    flat = logits.view(-1)
    before = flat.take(places)
    flat.scatter_(0, places, torch.full_like(before, -torch.inf))
    left = logits.amax(-1) > -torch.inf
    flat.scatter_(0, places, torch.where(left.take(row_of), -torch.inf, before))


def _add_bias(logits: Tensor, pieces: Sequence[Slice]) -> None:
    entries = [(row, token_id, bias) for row, piece in enumerate(pieces) for token_id, bias in piece.sampling.logit_bias]
    rows, ids, bias = zip(*entries, strict=True)
    places = upload(_flat(rows, ids, logits.shape[1])[1], logits.device)
    flat = logits.view(-1)
    flat.scatter_(0, places, flat.take(places) + upload(np.array(bias, dtype=np.float32), logits.device))


def _penalise(logits: Tensor, pieces: Sequence[Slice]) -> None:
    places: list[Ids] = []
    outputs: list[Ids] = []
    rules: list[tuple[float, float, float]] = []
    for row, piece in enumerate(pieces):
        rule = piece.sampling
        if not rule.has_penalties:
            continue
        counts = piece.counts or _counted(piece)
        places.append(np.array(counts.ids) + row * logits.shape[1])
        outputs.append(np.array(counts.outputs))
        rules.append((rule.repetition_penalty, rule.frequency_penalty, rule.presence_penalty))
    lengths = [len(part) for part in places]
    where = upload(np.concatenate(places), logits.device)
    table = np.repeat(np.array(rules, dtype=np.float32), lengths, axis=0)
    factors = np.concatenate([table, np.concatenate(outputs).astype(np.float32)[:, None]], axis=1)
    repetition, frequency, presence, count = upload(factors, logits.device).unbind(1)
    flat = logits.view(-1)
    values = flat.take(where)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * count - presence * (count > 0)
    flat.scatter_(0, where, values)


def _counted(piece: Slice) -> TokenCounts:
    counts = TokenCounts(piece.num_prompt_tokens)
    counts.catch_up(piece.tokens)
    return counts


def _flat(rows: Sequence[int], ids: Sequence[int], vocab_size: int) -> tuple[Ids, Ids]:
    """Rows, and places in the flattened logits."""
    row_of = np.array(rows, dtype=np.int64)
    return row_of, row_of * vocab_size + np.array(ids, dtype=np.int64)
