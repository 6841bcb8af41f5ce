from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from protos.contract.errors import ModelError
from tests.support.torch_models import GREEDY, LogitsProbe, a_runner, a_slice, engine_config, feed, random_tokens
from workers.batching.runner import Slice
from workers.engines.torch.build import ModelConfig, create_runner

# The native kernels, where there are any, share their work among threads.
pytestmark = pytest.mark.usefixtures("two_threads")

TOKENS = random_tokens(1, 40)
TABLE = (7, 0, 3)


@pytest.fixture(params=["tiny_llama", "tiny_mistral4"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_identity_and_layout(folder: Path) -> None:
    runner = a_runner(folder, dtype="bfloat16", block_tokens=8)
    assert runner.identity.vocab_size == 272
    assert runner.identity.context_tokens == 4096
    assert runner.identity.eos_token_ids == (2,)
    assert len(runner.identity.weights_digest) == 32
    assert runner.identity.tokenizer_digest
    layout = runner.layout
    assert (layout.block_tokens, layout.dtype) == (8, "bfloat16")
    assert (layout.name, layout.row_bytes, layout.num_layers) in {("gqa:k+v", 128, 3), ("mla:latent+rope", 96, 4)}
    assert sum(len(runner.read_block(0, group)) for group in range(layout.num_groups)) == layout.block_bytes


def test_logits_are_computed_for_sampling_rows_only(folder: Path) -> None:
    runner = a_runner(folder)
    probe = LogitsProbe(runner)
    silent = a_slice(TOKENS, 0, 20, (1, 2), sample=False)
    assert [result.token_id for result in runner.run([silent])] == [None]
    results = runner.run([a_slice(TOKENS, 20, 20, (1, 2, 4), sample=False), a_slice(TOKENS, 0, 9, (5,))])
    assert [logits.shape[0] for logits in probe.seen] == [0, 1]
    assert results[0].token_id is None
    assert results[1].token_id is not None


def test_batch_mates_and_block_places_change_nothing_but_rounding(folder: Path) -> None:
    """Prefill chunks and decodes of unlike lengths in one step against each alone on fresh blocks."""
    prompts = [random_tokens(seed, length) for seed, length in enumerate((70, 31, 30, 17, 5, 1))]
    alone = []
    for prompt in prompts:
        runner = a_runner(folder, num_blocks=8)
        probe = LogitsProbe(runner)
        feed(runner, prompt, [], (0, 1, 2, 3, 4))
        alone.append(probe.seen[-1])
    runner = a_runner(folder)
    tables = [tuple(range(90 - 6 * index, 84 - 6 * index, -1)) for index in range(len(prompts))]
    runner.run([a_slice(p, 0, len(p) - 1, t, sample=False) for p, t in zip(prompts, tables, strict=True) if len(p) > 1])
    probe = LogitsProbe(runner)
    last = [a_slice(prompt, len(prompt) - 1, 1, table) for prompt, table in zip(prompts, tables, strict=True)]
    chunk = a_slice(TOKENS, 0, 33, (91, 92, 93))
    runner.run([*last[:3], chunk, *last[3:]])
    together = torch.cat((probe.seen[0][:3], probe.seen[0][4:]))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_stale_rows_of_an_earlier_sequence_are_never_read(folder: Path) -> None:
    """Not-a-number left behind in blocks must not reach their next user, padded decodes included."""
    clean, dirty = a_runner(folder), a_runner(folder)
    poison = memoryview(torch.full((dirty.layout.group_bytes(0) // 4,), float("nan")).numpy()).cast("B")
    for block in range(96):
        for group in range(dirty.layout.num_groups):
            dirty.write_block(block, group, 0, poison[: dirty.layout.group_bytes(group)])
    long, short = random_tokens(3, 30), random_tokens(4, 25)
    for runner in (clean, dirty):
        runner.run([a_slice(long, 0, 29, (5, 6), sample=False), a_slice(short, 0, 24, (8, 9), sample=False)])
    step = [a_slice(long, 29, 1, (5, 6)), a_slice(short, 24, 1, (8, 9))]
    assert clean.run(step) == dirty.run(step)
    assert all(result.error is None for result in dirty.run(step))


@pytest.mark.parametrize(
    "broken",
    [
        a_slice((16, 17, 272), 0, 3, (1,)),
        a_slice((16, -1), 0, 2, (1,)),
        a_slice(TOKENS, 0, 17, (1,)),
        a_slice(TOKENS, 0, 41, TABLE),
        a_slice(TOKENS, 0, 0, TABLE),
        a_slice((16,) * 5000, 4090, 20, (1,) * 400),
    ],
)
def test_an_impossible_slice_fails_alone(folder: Path, broken: Slice) -> None:
    runner = a_runner(folder)
    mate = a_slice(TOKENS, 0, 40, TABLE)
    (expected,) = runner.run([mate])
    bad, good = runner.run([broken, mate])
    assert bad.token_id is None
    assert bad.error
    assert good == expected
    assert runner.run([broken])[0].error == bad.error


def test_a_sequence_with_broken_kv_fails_alone(folder: Path) -> None:
    runner = a_runner(folder)
    runner.run([a_slice(TOKENS, 0, 39, TABLE, sample=False)])
    mate = a_slice(TOKENS, 0, 40, (10, 11, 12))
    (expected,) = runner.run([mate])
    runner.write_block(TABLE[0], 0, 0, memoryview(torch.full((4,), float("nan")).numpy()).cast("B"))
    bad, good = runner.run([a_slice(TOKENS, 39, 1, TABLE), mate])
    assert bad.error == "the logits are not finite"
    assert good == expected


def test_seeded_draws_do_not_depend_on_chunks(folder: Path) -> None:
    seeded = replace(GREEDY, temperature=1.0, seed=5)
    drawn = set()
    for cuts in ((), (13,), (1, 2, 39)):
        runner = a_runner(folder)
        bounds = [0, *cuts, len(TOKENS)]
        for start, end in pairwise(bounds):
            result = runner.run([a_slice(TOKENS, start, end - start, TABLE, sampling=seeded, output_index=3)])[0]
        drawn.add(result.token_id)
    assert len(drawn) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(folder: Path, dtype: str) -> None:
    exact, rounded = a_runner(folder), a_runner(folder, dtype=dtype)
    probes = LogitsProbe(exact), LogitsProbe(rounded)
    for runner in (exact, rounded):
        feed(runner, TOKENS, [20, 39], TABLE)
    for wide, narrow in zip(probes[0].seen, probes[1].seen, strict=True):
        assert torch.nn.functional.cosine_similarity(wide, narrow).item() > 0.98


def test_refusals_of_the_builder(tiny_llama: Path) -> None:
    def build(dtype: str = "float32", device: str = "cpu", **model: object) -> None:
        config = ModelConfig(name="tiny", source=str(tiny_llama), dtype=dtype, **model)
        create_runner(config, engine_config(device=device), tiny_llama)

    with pytest.raises(ModelError, match="context_tokens"):
        build(context_tokens=5000)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="no CUDA device"):
            build(device="cuda")
