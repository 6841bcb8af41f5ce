"""The native CPU step against the torch decoder and the fp64 reference, on random shapes, lengths and batches, in bf16."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.threads import threads
from tests.support.torch_models import a_runner, a_slice, exact_tensors, random_tokens
from workers.batching.runner import Slice
from workers.engines.torch import reference
from workers.engines.torch.config import read_config
from workers.engines.torch.native.decoder import NativeDecoder
from workers.engines.torch.native.library import load_library
from workers.engines.torch.runner import TorchRunner
from workers.engines.torch.tiny import write_tiny

pytestmark = [
    pytest.mark.skipif(load_library() is None, reason="this machine has no compiler or no AVX-512 bf16"),
    pytest.mark.usefixtures("two_threads"),
]

SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 2}),
    ("llama", {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 16, "tie_word_embeddings": True}),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 72, "intermediate_size": 88}),
    ("mistral", {"sliding_window": 40}),
    ("mistral-small-4", {}),
    ("mistral-small-4", {"num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 48, "kv_lora_rank": 40}),
    ("mistral-small-4", {"first_k_dense_replace": 1, "n_routed_experts": 5, "num_experts_per_tok": 5, "norm_topk_prob": False}),
    ("mistral-small-4", {"rope_interleave": False, "num_attention_heads": 9, "num_key_value_heads": 9, "qk_nope_head_dim": 20}),
]  # fmt: skip


def two_runners(folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[TorchRunner, TorchRunner]:
    """The native runner, and one that torch's operators serve."""
    native = a_runner(folder, dtype="bfloat16", **fields)
    assert isinstance(native._decoder, NativeDecoder)
    monkeypatch.setattr("workers.engines.torch.native.decoder.load_library", lambda: None)
    plain = a_runner(folder, dtype="bfloat16", **fields)
    assert not isinstance(plain._decoder, NativeDecoder)
    return native, plain


def logits_of(runner: TorchRunner, pieces: list[Slice]) -> Tensor:
    with torch.inference_mode():
        return runner._steps.logits(runner._decoder, pieces, runner._cache, torch.device("cpu")).clone()


def plain_logits_of(runner: TorchRunner, pieces: list[Slice]) -> Tensor:
    """Of a runner that torch's operators serve, for which one thread is as good as two."""
    with threads(1):
        return logits_of(runner, pieces)


def exact_logits(folder: Path, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """By the reference in fp64, after every position of each sequence."""
    with threads(1):
        config, tensors = read_config(folder), exact_tensors(folder)
        return [reference.reference_logits(config, tensors, tokens) for tokens in sequences]


def errors_of(logits: Tensor, exact: Tensor) -> Tensor:
    """The largest error of each row, as a share of the largest exact logit."""
    return (logits.double() - exact).abs().amax(-1) / exact.abs().max()


def assert_no_worse(native: Tensor, plain: Tensor, exact: Tensor, *, outliers: int = 0) -> None:
    """Native logits are as near the exact ones as those of torch in bf16, whose rounding is the same.

    Where two experts are almost equally likely, rounding picks either: `outliers` rows of a mixture may be off by more.
    """
    ours, theirs = errors_of(native, exact).sort().values, errors_of(plain, exact).sort().values
    kept = max(1, len(ours) - outliers)
    bound = max(1.5 * float(theirs[kept - 1]), 0.02)
    assert float(ours[kept - 1]) < bound, (ours, theirs)


@pytest.mark.parametrize(
    ("kind", "dims"), SHAPES, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values()))
)
def test_random_batches(kind: str, dims: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and decodes of several sequences in one batch, more rows than the one-call step takes, and scattered blocks."""
    rng = random.Random(str(dims))
    folder = write_tiny(kind, tmp_path / "model", 5, **dims)
    block_tokens = rng.choice((1, 5, 16, 64))
    runners = two_runners(
        folder, monkeypatch, block_tokens=block_tokens, num_blocks=1400 // block_tokens + 24, max_batch_tokens=200
    )
    lengths = [rng.randint(2, 90) for _ in range(12)] + [130]
    free = list(range(runners[0].num_blocks))
    rng.shuffle(free)
    tables = [tuple(free.pop() for _ in range(-(-length // block_tokens))) for length in lengths]
    sequences = [random_tokens(seed, length) for seed, length in enumerate(lengths)]
    exact = exact_logits(folder, sequences)
    done = [0] * len(lengths)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        pieces: list[Slice] = []
        room = 200
        chosen = [i for i in range(len(lengths)) if done[i] < lengths[i] and rng.random() < 0.7]
        for one_row in (True, False):
            for i in chosen:
                decode = i % 3 != 0 and done[i] > 0
                count = 1 if decode else min(rng.randint(1, 60), lengths[i] - done[i], room)
                sample = i % 4 != 0 or not pieces  # some slices sample nothing, but never all of them
                if decode is one_row and count <= room and count > 0:
                    pieces.append(a_slice(sequences[i], done[i], count, tables[i], request_id=str(i), sample=sample))
                    room -= count
        if not pieces:
            continue
        results = [logits_of(runners[0], pieces), plain_logits_of(runners[1], pieces)]
        sampled = [piece for piece in pieces if piece.sample]
        wanted = torch.stack([exact[int(piece.request_id)][piece.start + piece.count - 1] for piece in sampled])
        seen.append((results[0], results[1], wanted))
        for piece in pieces:
            done[int(piece.request_id)] = piece.start + piece.count
    native, plain, wanted = (torch.cat(part) for part in zip(*seen, strict=True))
    assert len(wanted) > 40
    if kind == "mistral-small-4":
        visits = runners[0].expert_visits()
        config: Any = read_config(folder)
        mixtures = config.num_layers - config.num_dense_layers
        assert sum(visits) == sum(lengths) * config.num_experts_per_token * mixtures
        assert sum(runners[1].expert_visits()) == sum(visits)
        assert len(visits) == config.num_experts
    assert_no_worse(native, plain, wanted, outliers=len(wanted) // 10 if kind == "mistral-small-4" else 0)


@pytest.mark.parametrize("kind", ["llama", "mistral-small-4"])
def test_narrow_steps_of_every_width(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One-call steps of 1 to 40 rows, contexts beyond one split of the decode attention."""
    folder = write_tiny(kind, tmp_path / "model", 6)
    native, plain = two_runners(folder, monkeypatch, block_tokens=16, num_blocks=900, max_batch_tokens=400)
    tokens = random_tokens(3, 330)
    tables = [tuple(range(21 * row, 21 * row + 21)) for row in range(40)]
    for row, table in enumerate(tables):
        length = 329 if row == 3 else 20 + 7 * row
        logits_of(native, [a_slice(tokens, 0, length, table)])
        plain_logits_of(plain, [a_slice(tokens, 0, length, table)])
    (exact,) = exact_logits(folder, [tokens])
    for width in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17, 31, 33, 40):
        pieces = [a_slice(tokens, 329 if row == 3 else 20 + 7 * row, 1, tables[row]) for row in range(width)]
        wanted = torch.stack([exact[piece.start] for piece in pieces])
        outliers = width // 10 if kind == "mistral-small-4" else 0
        assert_no_worse(logits_of(native, pieces), plain_logits_of(plain, pieces), wanted, outliers=outliers)


@pytest.mark.parametrize("dims", [{}, {"tie_word_embeddings": True, "hidden_size": 72, "intermediate_size": 200}])
def test_int8_weights_as_they_are_stored(dims: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths that are no multiple of a register, narrow and wide steps, against the same weights decoded."""
    folder = write_tiny("llama", tmp_path / "model", 8, encoding="int8", **dims)
    native = a_runner(folder, dtype="bfloat16", block_tokens=16, num_blocks=900, max_batch_tokens=400)
    assert isinstance(native._decoder, NativeDecoder)
    exact = a_runner(folder, dtype="float32", block_tokens=16, num_blocks=900, max_batch_tokens=400, weights="decoded")
    monkeypatch.setattr("workers.engines.torch.native.decoder.load_library", lambda: None)
    plain = a_runner(folder, dtype="bfloat16", block_tokens=16, num_blocks=900, max_batch_tokens=400, weights="decoded")
    tokens = random_tokens(3, 330)
    for widths in ([329], [40, 1], [1], [1] * 2, [1] * 3, [1] * 5, [1] * 33, [1, 1, 150]):
        pieces = [a_slice(tokens, 0, width, tuple(range(21 * row, 21 * row + 21))) for row, width in enumerate(widths)]
        seen = [logits_of(native, pieces), *(plain_logits_of(runner, pieces) for runner in (plain, exact))]
        assert_no_worse(*(logits.double() for logits in seen))


def test_two_engines_of_one_process_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Steps from two threads at once give the bits that they give one after the other."""
    folder = write_tiny("mistral-small-4", tmp_path / "model", 9)
    runners = [a_runner(folder, dtype="bfloat16", block_tokens=16, num_blocks=64) for _ in range(2)]
    prompts = [random_tokens(seed, 200) for seed in (1, 2)]

    def steps(index: int) -> list[Tensor]:
        runner, tokens, table = runners[index], prompts[index], tuple(range(13))
        first = logits_of(runner, [a_slice(tokens, 0, 60, table)])
        return [first, *(logits_of(runner, [a_slice(tokens, at, 1, table)]) for at in range(60, 200))]

    alone = [steps(0), steps(1)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(steps, (0, 1)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_stale_bytes_behind_a_sequence_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("llama", "mistral-small-4"):
        folder = write_tiny(kind, tmp_path / kind, 7)
        with monkeypatch.context() as patch:
            native, _ = two_runners(folder, patch, block_tokens=16, num_blocks=8)
        tokens = random_tokens(4, 40)
        clean = [logits_of(native, [a_slice(tokens, *part, (2, 5, 1))]) for part in ((0, 38), (38, 1))]
        poison = memoryview(b"\xff" * native.layout.group_bytes(0))
        for block in range(8):
            for group in range(native.layout.num_groups):
                native.write_block(block, group, 0, poison[: native.layout.group_bytes(group)])
        dirty = [logits_of(native, [a_slice(tokens, *part, (2, 5, 1))]) for part in ((0, 38), (38, 1))]
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
