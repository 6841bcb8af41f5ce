"""The torch engine keeps the contract, for both shapes, with the slow twin as the source of the right tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.contract.driver import EngineFactory, EngineShape, Expected
from tests.contract.engine_contract import EngineContract
from tests.contract.engine_handoff_contract import HandOffContract
from tests.contract.engine_move_contract import MoveContract
from tests.contract.engine_prefix_contract import PrefixContract
from tests.contract.engine_recall_contract import (
    LOWER_DISK_BLOCKS,
    LOWER_HOST_BLOCKS,
    SIZE,
    RecalledBytesContract,
    TieredFactory,
)
from tests.contract.engine_room_contract import RoomContract
from tests.support.tier_world import HandLanes
from tests.support.torch_models import a_runner, an_engine, exact_tensors, run_all
from workers.batching.engine_limits import EngineLimits
from workers.batching.paged_engine import PagedEngine
from workers.engine_api.clock import ManualClock
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engines.torch.config import read_config
from workers.engines.torch.reference import reference_logits
from workers.engines.torch.sampler_reference import draw
from workers.engines.torch.tiny import write_tiny
from workers.kv_tiers.disk_files import DiskFiles, slot_bytes_of

DIMS = {
    "llama": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
    "mistral-small-4": {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
}


@pytest.fixture(scope="module", params=sorted(DIMS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "model"
    return write_tiny(request.param, out, 21, max_position_embeddings=512, **DIMS[request.param])


@pytest.fixture
def make_engine(folder: Path) -> EngineFactory:
    def make(shape: EngineShape) -> Engine:
        fields = {name: getattr(shape, name) for name in EngineShape.__dataclass_fields__}
        return an_engine(folder, **fields)

    return make


@pytest.fixture
def make_tiered(folder: Path) -> Iterator[TieredFactory]:
    with ExitStack() as stack:

        def make(files: Path, lanes: HandLanes, clock: ManualClock, num_blocks: int) -> PagedEngine:
            runner = a_runner(folder, num_blocks=num_blocks, block_tokens=SIZE)
            layout = runner.layout
            limits = EngineLimits(max_batch_tokens=32, max_running=3, host_cache_bytes=LOWER_HOST_BLOCKS * layout.block_bytes)
            disk = DiskFiles(files, LOWER_DISK_BLOCKS * slot_bytes_of(layout), runner.identity, layout)
            engine = PagedEngine(runner, limits, files=disk, clock=clock, lanes=lanes)
            stack.callback(engine.close)
            return engine

        yield make


@pytest.fixture(scope="module")
def expected(folder: Path) -> Iterator[Expected]:
    """Every token is drawn from the slow twin's logits after the tokens before it.

    A pass of the slow twin gives the logits after every position of what it is shown. It is shown the answer of an engine at
    once, so that one pass is enough where that is right; from the first token that is not, what was drawn itself.
    """
    config, tensors = read_config(folder), exact_tensors(folder)
    known: dict[tuple[int, ...], torch.Tensor] = {}
    guesser = an_engine(folder)

    def logits_after(tokens: tuple[int, ...], guess: tuple[int, ...]) -> torch.Tensor:
        if tokens not in known:
            shown = guess if guess[: len(tokens)] == tokens else tokens
            logits = reference_logits(config, tensors, shown)
            known.update({shown[:end]: logits[end - 1] for end in range(len(tokens), len(shown) + 1)})
        return known[tokens]

    @cache
    def answer(prompt: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
        guessed = run_all(guesser, [EngineRequest(request_id="guess", epoch=1, prompt=prompt, sampling=sampling)])
        guess, output = (*prompt, *guessed["guess"]), tuple[int, ...]()
        while len(output) < sampling.max_tokens:
            token = draw(logits_after((*prompt, *output), guess).numpy(), sampling, len(output))
            output += (token,)
            if token in sampling.stop_token_ids:
                break
        return output

    yield lambda prompt, sampling: list(answer(prompt, sampling))
    guesser.close()


class TestTorchEngine(EngineContract):
    pass


class TestTorchHandOff(HandOffContract):
    pass


class TestTorchRoom(RoomContract):
    pass


class TestTorchPrefix(PrefixContract):
    pass


class TestTorchMoves(MoveContract):
    pass


class TestTorchRecall(RecalledBytesContract):
    pass
