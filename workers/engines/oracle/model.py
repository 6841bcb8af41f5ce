"""The arithmetic that stands for a model. Every token is a function of everything the engine had to keep right.

    chain(p) = chain(p - 1) + mix(mix(key + token(p) * GOLDEN) + p * GOLDEN), chain(-1) = key
    row(layer, p), word w = mix(chain(p) + (layer * words + w) * GOLDEN), but chain(p) itself for layer 0, word 0
    fold(n) = the xxh3 digests of each layer's rows [0, n) in order of position
    token n = ALPHABET[H(key, fold, seed if temperature > 0 else 0, n) mod its length]

All sums are modulo 2**64, words are little endian, `mix` is the finaliser of splitmix64. The chain makes a row depend on
all tokens up to it; the fold reads every byte of the KV cache. So a missing, stale, swapped or foreign block changes
the draw. `reference.py` says the same in plain Python.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from string import ascii_letters

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_digest, xxh3_64_intdigest

from workers.engine_api.types import KvLayout, ModelIdentity, SamplingParams

PAD, BOS, EOS, FIRST_BYTE = 0, 1, 2, 3
VOCAB_SIZE = FIRST_BYTE + 256
TOKENIZER_DIGEST = "oracle-bytes"
ALPHABET = tuple(FIRST_BYTE + byte for byte in (ascii_letters + " ").encode())  # never an end of its own accord
WORD_BYTES = 8
GOLDEN = 0x9E3779B97F4A7C15
U64 = (1 << 64) - 1

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class OracleModel:
    """One model: another name is another model with other tokens."""

    name: str
    num_layers: int = 4
    row_bytes: int = 16
    context_tokens: int = 32_768

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.row_bytes < WORD_BYTES or self.row_bytes % WORD_BYTES:
            raise ValueError(f"{self.num_layers} layers of {self.row_bytes} bytes: need a layer and whole words of 8 bytes")

    @property
    def words(self) -> int:
        """64-bit words of one row in one layer."""
        return self.row_bytes // WORD_BYTES

    @cached_property
    def weights_digest(self) -> str:
        """What stands for the weights."""
        return blake2b(f"{self.name}|{self.num_layers}|{self.row_bytes}".encode(), digest_size=16).hexdigest()

    @cached_property
    def key(self) -> int:
        """The key of all pseudo-random functions of the model; 64 bits."""
        return int.from_bytes(blake2b(self.weights_digest.encode(), digest_size=8, person=b"autan-oracle").digest(), "little")

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(
            model=self.name,
            architecture="oracle",
            weights_digest=self.weights_digest,
            tokenizer_digest=TOKENIZER_DIGEST,
            vocab_size=VOCAB_SIZE,
            context_tokens=self.context_tokens,
            eos_token_ids=(EOS,),
            has_logits=False,
        )

    def layout(self, block_tokens: int) -> KvLayout:
        return KvLayout(
            block_tokens=block_tokens, num_layers=self.num_layers, row_bytes=self.row_bytes, dtype="bytes", name="oracle"
        )


def mix(values: Words) -> Words:
    """The finaliser of splitmix64, element by element."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def chain_steps(key: int, tokens: Sequence[int], positions: Words) -> Words:
    """What each token adds to the chain at its position."""
    token_words = np.array(tokens, dtype=np.uint64)
    return mix(mix(np.uint64(key) + token_words * np.uint64(GOLDEN)) + positions * np.uint64(GOLDEN))


def kv_rows(model: OracleModel, chain: Words) -> Words:
    """The rows of all layers for these chain values: `[positions, layers, words]`."""
    lanes = np.arange(model.num_layers * model.words, dtype=np.uint64) * np.uint64(GOLDEN)
    rows = mix(chain[:, None] + lanes)
    rows[:, 0] = chain
    return rows.reshape(len(chain), model.num_layers, model.words)


def fold_layers(layer_digests: Sequence[bytes]) -> int:
    """One number for everything that was read."""
    return xxh3_64_intdigest(b"".join(layer_digests))


def read_layers(layers: Words) -> int:
    """The fold of `[layers, words]`: for each layer its rows one after another."""
    return fold_layers([xxh3_64_digest(layer.data) for layer in layers])


def draw(key: int, fold: int, sampling: SamplingParams, index: int) -> int:
    """The token of output index `index` behind KV rows with this fold."""
    seed = sampling.seed if sampling.temperature > 0 else 0
    drawn = xxh3_64_intdigest(struct.pack("<4Q", key, fold, seed & U64, index))
    return ALPHABET[drawn % len(ALPHABET)]
