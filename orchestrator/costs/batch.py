"""What one engine step computes: chunks of prompts and one token for each decoding sequence."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.costs.number import Number, larger, smaller


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """`sequences` prompts that compute `new` tokens each, after `cached` ones; `ends` of them sample a token."""

    sequences: Number
    new: Number
    cached: Number = 0.0
    ends: Number = 1.0  # share of the sequences whose prompt ends with this chunk

    @property
    def tokens(self) -> Number:
        """New tokens of all sequences."""
        return self.sequences * self.new

    def pairs(self, limit_tokens: Number) -> Number:
        """(query, key) pairs of causal attention in which no query reads more than `limit_tokens` keys, itself included."""
        growing = smaller(larger(limit_tokens - self.cached, 0.0), self.new)
        full = growing * self.cached + growing * (growing + 1.0) / 2.0
        return self.sequences * (full + (self.new - growing) * limit_tokens)

    def keys(self, limit_tokens: Number) -> Number:
        """Keys that are read at least once: a window drops the ones before it."""
        return self.sequences * smaller(self.cached + self.new, limit_tokens + self.new)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodes:
    """`sequences` that compute one token each with `context` tokens before and including it, on average."""

    sequences: Number
    context: Number

    def keys(self, limit_tokens: Number) -> Number:
        """Keys that all sequences read."""
        return self.sequences * smaller(self.context, limit_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One step of one data-parallel group. `drafted` tokens are verified beside each decoded one."""

    chunks: tuple[Chunk, ...] = ()
    decodes: tuple[Decodes, ...] = ()
    drafted: Number = 0.0

    @property
    def tokens(self) -> Number:
        """Rows of every matrix product but the head's."""
        found: Number = 0.0
        for chunk in self.chunks:
            found = found + chunk.tokens
        for decodes in self.decodes:
            found = found + decodes.sequences * (1.0 + self.drafted)
        return found

    @property
    def sampled(self) -> Number:
        """Rows of the head."""
        found: Number = 0.0
        for chunk in self.chunks:
            found = found + chunk.sequences * chunk.ends
        for decodes in self.decodes:
            found = found + decodes.sequences * (1.0 + self.drafted)
        return found

    @property
    def sequences(self) -> Number:
        """Sequences that the host touches."""
        found: Number = 0.0
        for chunk in self.chunks:
            found = found + chunk.sequences
        for decodes in self.decodes:
            found = found + decodes.sequences
        return found
