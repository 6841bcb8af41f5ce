"""Choosing the next tokens of a batch from its logits, on the device, with one fetch. Noise depends on seed and index alone.

Theory of operation. A greedy row (temperature 0) takes its greatest logit; of equal ones the lowest id. Every other row
draws by Gumbel-max, the greatest log-probability plus noise of its own, so that a last-bit difference of logits between
batches or workers almost never changes the token, and no state travels with a request.

Rows with top_k or top_p draw among candidates, ordered by logit, then by id. The first `top_k` stay; of those the fewest
whose weights reach `top_p` of the sum; of those the ones whose weight is at least `min_p` of the greatest. Only the head of
the order is looked at. A row whose candidates may reach beyond it is drawn again over the whole vocabulary, the only
case of a second fetch.

Rows without either draw in two levels, which gives the same distribution without ordering anything: a group of consecutive
ids by its summed weight, then a token inside it.

Weights are fp32, noise and scores fp64; of equal scores the first in order wins. Sums go through a tree of fixed shape and
everything else is by element or by row, so a row gives the same token in every batch, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from protos.contract.errors import AutanError
from workers.batching.runner import Sampled, Slice
from workers.engine_api.types import TokenLogprobs
from workers.engines.torch.logit_edits import edit_logits, is_edited, upload
from workers.engines.torch.philox import GROUP_NOISE, gumbel_of, gumbel_run

HEAD = 1024  # candidates that are looked at before the whole vocabulary is ordered
GROUP = 128  # consecutive ids of one group
_SMALL_HEAD = 64
_COLDEST = 1e-30  # a temperature below it draws like it: the greatest logits share everything

NOT_FINITE = -1
NOTHING_LEFT = -2
BEYOND_HEAD = -3
_ERRORS = {NOT_FINITE: "the logits are not finite", NOTHING_LEFT: "the grammar allows no token"}


class Sampler:
    """Keeps the scratch memory of one engine thread."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    @torch.inference_mode()
    def sample(self, logits: Tensor, pieces: Sequence[Slice]) -> list[Sampled]:
        """One token for each row of `[S, V]` logits of any float type, which may be overwritten.

        A row fails alone: when its logits are not finite (a sum beyond fp32 counts), when its grammar fails or allows nothing.
        """
        logits = logits.float()
        finite = torch.isfinite(logits.sum(-1))
        if not any(_is_involved(piece) for piece in pieces):
            return [_result(code, None) for code in torch.where(finite, argmax(logits), NOT_FINITE).tolist()]
        logits = logits.contiguous()
        masks, refused = _packed_masks(pieces, logits.shape[1])
        reporter = _Reporter(logits, pieces)
        edit_logits(logits, pieces, masks)
        rules = _Rules.upload(pieces, logits)
        codes = torch.where(finite, self._choose(logits, pieces, rules), NOT_FINITE)
        found, logprobs = reporter.fetch(codes)
        again = [row for row, code in enumerate(found) if code == BEYOND_HEAD]
        if again:
            rows = upload(np.array(again, dtype=np.int64), logits.device)
            parts = zip(logits.index_select(0, rows)[:, None], rules.of(rows).split(), strict=True)
            chosen = torch.cat([_draw_ordered(part, its_rules, logits.shape[1]) for part, its_rules in parts])
            found, logprobs = reporter.fetch(codes.index_copy_(0, rows, chosen))
        return [
            Sampled(None, refused[row]) if row in refused else _result(code, logprobs.get(row))
            for row, code in enumerate(found)
        ]

    def _choose(self, logits: Tensor, pieces: Sequence[Slice], rules: _Rules) -> Tensor:
        """A token id or code for each row, int64 `[S]`."""
        greedy = [row for row, piece in enumerate(pieces) if piece.sampling.temperature <= 0]
        free = [row for row, piece in enumerate(pieces) if piece.sampling.temperature > 0 and not _is_ordered(piece)]
        ordered = [row for row, piece in enumerate(pieces) if piece.sampling.temperature > 0 and _is_ordered(piece)]
        parts = []
        if greedy:
            part, _ = _rows(logits, rules, greedy)
            best = argmax(part)
            parts.append((greedy, torch.where(part.gather(1, best[:, None])[:, 0] == -torch.inf, NOTHING_LEFT, best)))
        if free:
            parts.append((free, self._draw_free(*_rows(logits, rules, free))))
        if ordered:
            head = min(logits.shape[1], max(_head_of(pieces[row]) for row in ordered))
            part, its_rules = _rows(logits, rules, ordered)
            weights = self._weights(part, its_rules) if any(_needs_total(pieces[row]) for row in ordered) else None
            parts.append((ordered, _draw_ordered(part, its_rules, head, weights)))
        if len(parts) == 1:
            return parts[0][1]
        order = upload(np.array([row for rows, _ in parts for row in rows], dtype=np.int64), logits.device)
        tokens = torch.cat([tokens for _, tokens in parts])
        return torch.empty_like(tokens).index_copy_(0, order, tokens)

    def _draw_free(self, logits: Tensor, rules: _Rules) -> Tensor:
        weights = self._weights(logits, rules)
        weights.masked_fill_(weights < rules.min_p, 0.0)
        groups = weights.view(len(weights), -1, GROUP)
        masses = _tree_sum(groups)
        first = torch.zeros_like(rules.index)
        noise = gumbel_run(first, masses.shape[1], rules.seed, rules.index, GROUP_NOISE)
        group = (masses.double().log_() + noise).argmax(-1, keepdim=True)
        inside = groups.gather(1, group[:, :, None].expand(-1, -1, GROUP))[:, 0]
        noise = gumbel_run(group * GROUP, GROUP, rules.seed, rules.index)
        tokens = group * GROUP + (inside.double().log_() + noise).argmax(-1, keepdim=True)
        return torch.where(logits.amax(-1) == -torch.inf, NOTHING_LEFT, tokens[:, 0])

    def _weights(self, logits: Tensor, rules: _Rules) -> Tensor:
        """exp((logit - greatest) / temperature), fp32, `[R, V rounded up to whole groups]`, valid until the next call."""
        rows, vocab_size = logits.shape
        width = GROUP * -(-vocab_size // GROUP)
        if self._scratch.shape[0] < rows or self._scratch.shape[1:] != (width,) or self._scratch.device != logits.device:
            self._scratch = torch.zeros(rows, width, device=logits.device)
        weights = self._scratch[:rows]
        part = weights[:, :vocab_size]
        torch.sub(logits, logits.amax(-1, keepdim=True), out=part)
        part.div_(rules.temperature).exp_()
        return weights


def argmax(logits: Tensor) -> Tensor:
    """The lowest id of the greatest logit, int64 `[S]`.

    On a CPU in two levels, several times faster than in one: the reduction without indexes is the vectorised one.
    """
    rows, width = logits.shape
    if logits.device.type != "cpu" or width % GROUP or not rows:
        return logits.argmax(-1)
    groups = logits.view(rows, -1, GROUP)
    group = groups.amax(-1).argmax(-1)
    inside = groups[torch.arange(rows), group].argmax(-1)
    return group * GROUP + inside


class _Rules:
    """The numbers of each row on the device; `[R, 1]` each."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        columns = table[:, :, None].unbind(1)
        self.temperature = columns[0].float()
        self.top_k = columns[1]
        self.top_p = columns[2]
        self.min_p = columns[3].float()
        self.seed = (columns[4].long(), columns[5].long())
        self.index = columns[6].long()

    @classmethod
    def upload(cls, pieces: Sequence[Slice], logits: Tensor) -> _Rules:
        """The rules of these rows of logits."""
        vocab_size = logits.shape[1]
        table = [
            (
                max(rule.temperature, _COLDEST),
                rule.top_k if 0 < rule.top_k < vocab_size else np.inf,
                rule.top_p,
                rule.min_p,
                rule.seed & 0xFFFFFFFF,
                (rule.seed >> 32) & 0xFFFFFFFF,
                piece.output_index & 0xFFFFFFFF,
            )
            for piece in pieces
            for rule in (piece.sampling,)
        ]
        return cls(upload(np.array(table, dtype=np.float64), logits.device))

    def of(self, rows: Tensor) -> _Rules:
        """The rules of some rows."""
        return _Rules(self._table.index_select(0, rows))

    def split(self) -> list[_Rules]:
        """Row by row."""
        return [_Rules(row[None]) for row in self._table]


class _Reporter:
    """Logprobs of the rows that ask for them, from the logits as the model gave them; one fetch for tokens and logprobs."""

    def __init__(self, logits: Tensor, pieces: Sequence[Slice]) -> None:
        self._wanted = {row: n for row, piece in enumerate(pieces) if (n := piece.sampling.logprobs) is not None}
        if not self._wanted:
            return
        self._rows = upload(np.array(list(self._wanted), dtype=np.int64), logits.device)
        raw = self._raw = logits.index_select(0, self._rows)
        self._log_total = raw.logsumexp(-1, keepdim=True)
        self._most = min(max(self._wanted.values()), logits.shape[1])
        _, ids = ordered_head(raw, min(_SMALL_HEAD, logits.shape[1]))
        self._top_ids = ids[:, : self._most]

    def fetch(self, codes: Tensor) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """The codes of all rows, and the logprobs by row."""
        if not self._wanted:
            return codes.tolist(), {}
        ids = torch.cat([codes.index_select(0, self._rows).clamp(min=0)[:, None], self._top_ids], dim=1)
        values = self._raw.gather(1, ids) - self._log_total
        packed = torch.cat([codes.double(), ids.double().flatten(), values.double().flatten()]).tolist()
        found = [int(code) for code in packed[: len(codes)]]
        width = 1 + self._most
        split = len(codes) + len(self._wanted) * width
        logprobs = {}
        for place, (row, count) in enumerate(self._wanted.items()):
            start = place * width
            top_ids = packed[len(codes) + start + 1 : len(codes) + start + 1 + count]
            top = packed[split + start + 1 : split + start + 1 + count]
            logprobs[row] = TokenLogprobs(packed[split + start], tuple(int(i) for i in top_ids), tuple(top))
        return found, logprobs


def ordered_head(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` greatest logits of each row and their ids, by logit, then by id.

    Which of the ids that share the least of these logits are here is only certain when all are.
    """
    if size == logits.shape[1]:
        return torch.sort(logits, dim=-1, descending=True, stable=True)
    values, ids = logits.topk(size, dim=-1)
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _draw_ordered(logits: Tensor, rules: _Rules, head: int, weights: Tensor | None = None) -> Tensor:
    """Tokens of rows with top_k or top_p. `weights` of all tokens are needed when the head does not hold them all."""
    values, ids = ordered_head(logits, head)
    greatest = values[:, :1]
    shares = ((values - greatest) / rules.temperature).exp_()
    place = torch.arange(head, device=logits.device)
    within_k = place < rules.top_k
    cumulative = (shares.double() * within_k).cumsum(-1)
    total = cumulative[:, -1:]
    if weights is not None:
        whole = _tree_sum(_tree_sum(weights.view(len(weights), -1, GROUP)).double())[:, None]
        total = torch.where(rules.top_k > head, whole, total)
    before = cumulative - shares.double()
    kept = within_k & (before < rules.top_p * total) & (shares >= rules.min_p) | (place == 0)
    last = values.gather(1, kept.sum(-1, keepdim=True) - 1)
    if head == logits.shape[1]:
        noise = gumbel_run(torch.zeros_like(rules.index), head, rules.seed, rules.index).gather(1, ids)
    else:
        noise = gumbel_of(ids, rules.seed, rules.index)
    scores = torch.where(kept, shares.double().log_() + noise, -torch.inf)
    tokens = ids.gather(1, scores.argmax(-1, keepdim=True))
    if head < logits.shape[1]:
        inside = (last > values[:, -1:]) & ((rules.top_k <= head) | rules.top_k.isinf())
        tokens = torch.where(inside, tokens, BEYOND_HEAD)
    return torch.where(greatest == -torch.inf, NOTHING_LEFT, tokens)[:, 0]


def _tree_sum(values: Tensor) -> Tensor:
    """Sums over the last dimension by halves: the same bits whatever else is in the batch."""
    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = torch.nn.functional.pad(values, (0, 1))
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def _rows(logits: Tensor, rules: _Rules, rows: list[int]) -> tuple[Tensor, _Rules]:
    if len(rows) == len(logits):
        return logits, rules
    places = upload(np.array(rows, dtype=np.int64), logits.device)
    return logits.index_select(0, places), rules.of(places)


def _is_involved(piece: Slice) -> bool:
    return piece.sampling.temperature > 0 or piece.sampling.logprobs is not None or is_edited(piece)


def _is_ordered(piece: Slice) -> bool:
    return piece.sampling.top_k > 0 or piece.sampling.top_p < 1


def _needs_total(piece: Slice) -> bool:
    return piece.sampling.top_p < 1 and not 0 < piece.sampling.top_k <= HEAD


def _head_of(piece: Slice) -> int:
    """Candidates to look at: twice top_k, so that equal logits rarely reach beyond them."""
    top_k = piece.sampling.top_k
    return max(_SMALL_HEAD, 1 << (2 * top_k - 1).bit_length()) if 0 < top_k <= HEAD // 2 else HEAD


def _packed_masks(pieces: Sequence[Slice], vocab_size: int) -> tuple[dict[int, memoryview], dict[int, str]]:
    """The grammar masks by row, and why those failed that did."""
    masks: dict[int, memoryview] = {}
    refused: dict[int, str] = {}
    size_bytes = 4 * -(-vocab_size // 32)
    for row, piece in enumerate(pieces):
        if piece.allowed is None:
            continue
        try:
            mask = piece.allowed()
        except AutanError as error:
            refused[row] = error.message
            continue
        if mask is not None and mask.nbytes != size_bytes:
            refused[row] = f"the grammar mask has {mask.nbytes} bytes, a vocabulary of {vocab_size} needs {size_bytes}"
        elif mask is not None:
            masks[row] = mask.cast("B")
    return masks, refused


def _result(code: int, logprobs: TokenLogprobs | None) -> Sampled:
    return Sampled(code, logprobs=logprobs) if code >= 0 else Sampled(None, _ERRORS[code])
