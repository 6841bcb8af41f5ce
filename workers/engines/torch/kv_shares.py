"""Which bytes of a KV row a rank holds. What leaves an instance is always the full row, however many ranks it has.

A row of grouped-query attention is the keys of all KV heads, then the values of all: two sides of `parts` equal pieces, and a
rank holds the same piece of each. With fewer KV heads than ranks several ranks hold the same piece. A latent row is one
piece that every rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from workers.engine_api.types import KvLayout
from workers.engines.torch.config import DecoderConfig, DenseConfig
from workers.engines.torch.ranks import RankOf, Ranks, kv_head_share

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RowShare:
    """Piece `part` of `parts`, each of `piece_bytes`, of every run of `parts` pieces."""

    parts: int
    part: int
    piece_bytes: int

    def layout(self, full: KvLayout) -> KvLayout:
        """How this share lies in a block: shorter rows, the same layer groups."""
        row_bytes = full.row_bytes // self.parts
        group_bytes = full.layers_per_group * full.block_tokens * row_bytes
        return replace(full, row_bytes=row_bytes, target_group_bytes=group_bytes)

    def split(self, offset_bytes: int, data: memoryview) -> tuple[int, memoryview]:
        """Of bytes at an offset of a full layer group those of this share: their offset in the share, and themselves."""
        if self.parts == 1:
            return offset_bytes, data
        source = np.frombuffer(data, dtype=np.uint8)
        stripe, end = self.parts * self.piece_bytes, offset_bytes + source.size
        first, last = -(-offset_bytes // stripe), end // stripe
        if first > last:
            pieces = [self._cut(source, offset_bytes, last)]
        else:
            middle = source[first * stripe - offset_bytes : last * stripe - offset_bytes]
            own = middle.reshape(-1, self.parts, self.piece_bytes)[:, self.part].reshape(-1)
            pieces = [self._cut(source, offset_bytes, first - 1), own, self._cut(source, offset_bytes, last)]
        start_stripe, within = divmod(offset_bytes, stripe)
        skipped = min(max(within - self.part * self.piece_bytes, 0), self.piece_bytes)
        return start_stripe * self.piece_bytes + skipped, np.concatenate(pieces).data

    def merge(self, into: Bytes, share: memoryview) -> None:
        """Writes the share of a whole layer group to its place in the full bytes."""
        rows = into.reshape(-1, self.parts, self.piece_bytes)
        rows[:, self.part] = np.frombuffer(share, dtype=np.uint8).reshape(-1, self.piece_bytes)

    def _cut(self, source: Bytes, offset_bytes: int, stripe: int) -> Bytes:
        """This share's bytes of one stripe, as far as the source has them."""
        begin = (stripe * self.parts + self.part) * self.piece_bytes - offset_bytes
        return source[max(begin, 0) : max(begin + self.piece_bytes, 0)]


def row_share(config: DecoderConfig, full: KvLayout, ranks: RankOf | Ranks) -> RowShare:
    """The share of one rank. Raises ModelError when the KV heads cannot be shared."""
    if not isinstance(config, DenseConfig):
        return RowShare(1, 0, full.row_bytes)
    heads = kv_head_share(config.num_kv_heads, ranks)
    count = heads.stop - heads.start
    parts = config.num_kv_heads // count
    return RowShare(parts, heads.start // count, full.row_bytes // (2 * parts))
