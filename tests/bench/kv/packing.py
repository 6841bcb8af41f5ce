"""What packing KV for the wire is worth: size, speed, the link below which it pays, and what fp8 does to tokens.

The KV is real: layer groups as the torch engine stores them, of SmolLM2-135M over the pages of this repository, and of a tiny
Mistral Small 4 with random weights over random tokens. One thread packs and unpacks; digests are not counted, they are the same
either way.

Packing pays on a link of L GB/s when `1 / L > share / L + pack + unpack` (seconds for each GB of KV; one after the other, as
for a single layer group). Where packing, link and unpacking overlap, it pays below the slower of pack and unpack.

Tokens: prompts are prefilled once, their KV goes to a second engine as it is and as fp8, and both decode greedily on from the
same first token, in equal batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.env import model_cache_dir
from configs.schema.pools import EngineConfig, ModelConfig
from tests.bench.engine.models import MAKERS
from tests.bench.kv.peer_envs import ROOT
from tests.bench.report import OUT, Row, row
from workers.engine_api.protocol import Engine
from workers.engine_api.types import EngineRequest, KvLayout, Phase, SamplingParams, TokenOut
from workers.engines.torch.build import create_engine
from workers.engines.torch.demo_model import ensure_demo_model
from workers.kv_transfer.encodings import Codec, Encoding, codec_of

MODELS = ("smollm2", "tiny4")
PACKED = (Encoding.LOSSLESS, Encoding.FP8)
KV_TOKENS = 1024
NEW_TOKENS = 64
_BLOCK_TOKENS = 64
_PROMPT_TOKENS = 192
_ALTERNATIVES = 20
_DECODE_DTYPE = "bfloat16"
_PAGES = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one round over all groups; seconds of CPU for each GB of KV, and the packed size for each byte."""

    share: float
    pack_s_per_gb: float
    unpack_s_per_gb: float

    @property
    def pays_below_gb_per_s(self) -> float:
        """The link below which it pays when nothing overlaps; see the module."""
        return (1 - self.share) / (self.pack_s_per_gb + self.unpack_s_per_gb)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two greedy continuations of one prompt go together, and how far the first logprobs are apart."""

    same_tokens: int
    new_tokens: int
    logprob_error: float


def text_tokens() -> list[int]:
    """The pages of this repository in the demo model's tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ensure_demo_model(model_cache_dir()) / "tokenizer.json"))
    return list(tokenizer.encode("\n".join((ROOT / page).read_text() for page in _PAGES)).ids)


def random_tokens(count: int) -> list[int]:
    """For models that have learned nothing."""
    import random

    rng = random.Random(7)
    return [rng.randrange(16, 49152) for _ in range(count)]


def engine_of(model_dir: Path, dtype: str, **changes: Any) -> Engine:
    """One compute thread, no prefix cache."""
    settings: dict[str, Any] = {"num_blocks": 96, "block_tokens": _BLOCK_TOKENS, "max_batch_tokens": 512, "threads": 1}
    config = EngineConfig(kind="torch", prefix_cache=False, **(settings | changes))
    return create_engine(ModelConfig(name="bench", source=str(model_dir), dtype=dtype), config, model_dir)


def request_of(name: str, prompt: Sequence[int], phase: Phase) -> EngineRequest:
    """Greedy, with the logprobs of the likeliest tokens, over whatever would end it."""
    sampling = SamplingParams(max_tokens=NEW_TOKENS, logprobs=_ALTERNATIVES)
    return EngineRequest(request_id=name, epoch=1, prompt=tuple(prompt), sampling=sampling, phase=phase)


def run(engine: Engine) -> dict[str, list[TokenOut]]:
    """Steps until nothing is left; what was sampled, by request."""
    outputs: dict[str, list[TokenOut]] = {}
    while engine.has_work():
        result = engine.step()
        if result.failed:
            raise RuntimeError(result.failed[0].message)
        for token in result.tokens:
            outputs.setdefault(token.request_id, []).append(token)
    return outputs


def kv_groups(model_dir: Path, dtype: str, tokens: Sequence[int]) -> tuple[KvLayout, list[bytes]]:
    """The layer groups of the full blocks of one prompt."""
    engine = engine_of(model_dir, dtype)
    try:
        engine.add(request_of("r", tokens, Phase.PREFILL))
        run(engine)
        blocks = engine.pin("r", 1)[: len(tokens) // _BLOCK_TOKENS]
        layout = engine.layout
        return layout, [bytes(engine.export_kv(block, group)) for block in blocks for group in range(layout.num_groups)]
    finally:
        engine.close()


def speed_of(codec: Codec, groups: Sequence[bytes]) -> Speed:
    """One round."""
    views = [memoryview(group) for group in groups]
    gigabytes = sum(map(len, groups)) / 1e9
    started_s = time.thread_time()
    packed = [codec.pack(view) for view in views]
    packed_s = time.thread_time()
    for one, view in zip(packed, views, strict=True):
        codec.unpack(memoryview(one), view.nbytes)
    ended_s = time.thread_time()
    share = sum(map(len, packed)) / 1e9 / gigabytes
    return Speed(share, (packed_s - started_s) / gigabytes, (ended_s - packed_s) / gigabytes)


def size_and_speed(models: Sequence[str], rounds: int) -> list[Row]:
    """Rows of every model, dtype and encoding."""
    rows = []
    for model in models:
        tokens = (text_tokens() if model == "smollm2" else random_tokens(KV_TOKENS))[:KV_TOKENS]
        for dtype in ("bfloat16", "float32"):
            layout, groups = kv_groups(MAKERS[model](OUT / "models"), dtype, tokens)
            for encoding in PACKED:
                codec = codec_of(encoding, layout)
                assert codec is not None
                speed_of(codec, groups)  # memory is touched and contexts are made before the clock counts
                found = [speed_of(codec, groups) for _ in range(rounds)]
                rows += speed_rows(f"{model} {dtype} {encoding.name.lower()}", found)
    return rows


def speed_rows(case: str, found: Sequence[Speed]) -> list[Row]:
    """The figures of one model, dtype and encoding."""
    figures: list[tuple[str, str, Callable[[Speed], float]]] = [
        ("KV packed, ratio", "x", lambda one: 1 / one.share),
        ("KV packed, share of the bytes", "", lambda one: one.share),
        ("pack, 1 thread", "GB/s", lambda one: 1 / one.pack_s_per_gb),
        ("unpack, 1 thread", "GB/s", lambda one: 1 / one.unpack_s_per_gb),
        ("CPU of both sides", "s/GB", lambda one: one.pack_s_per_gb + one.unpack_s_per_gb),
        ("pays on links below, no overlap", "GB/s", lambda one: one.pays_below_gb_per_s),
        ("pays on links below, overlapped", "GB/s", lambda one: 1 / max(one.pack_s_per_gb, one.unpack_s_per_gb)),
    ]
    return [row(metric, case, unit, [of(one) for one in found]) for metric, unit, of in figures]


def hand_over(source: Engine, target: Engine, name: str, prompt: Sequence[int], first: int, codec: Codec | None) -> None:
    """The KV of a held request goes to the other engine, which decodes from there; the source keeps it."""
    request = request_of(name, prompt, Phase.PREFILL)
    blocks = source.pin(name, 1)
    ticket = target.import_begin(request, len(prompt))
    for here, there in zip(blocks, ticket.block_ids, strict=True):
        for group in range(source.layout.num_groups):
            raw = source.export_kv(here, group)
            if codec is not None:
                raw = codec.unpack(memoryview(codec.pack(raw)), raw.nbytes)
            target.import_kv(there, group, 0, raw)
    target.import_commit(name, 1, (first,), exact=codec is None)


def continuations(model_dir: Path, prompts: Sequence[Sequence[int]], encoding: Encoding) -> dict[str, list[TokenOut]]:
    """What each prompt goes on with behind its first token when its KV travelled in this encoding."""
    room = len(prompts) * (-(-(_PROMPT_TOKENS + NEW_TOKENS) // _BLOCK_TOKENS) + 1)
    source, target = (engine_of(model_dir, _DECODE_DTYPE, num_blocks=room, max_running=len(prompts)) for _ in range(2))
    try:
        for index, prompt in enumerate(prompts):
            source.add(request_of(f"r{index}", prompt, Phase.PREFILL))
        firsts = run(source)
        codec = codec_of(encoding, source.layout)
        for index, prompt in enumerate(prompts):
            name = f"r{index}"
            hand_over(source, target, name, prompt, firsts[name][0].token_id, codec)
        return run(target)
    finally:
        source.close()
        target.close()


def agreement(exact: Sequence[TokenOut], packed: Sequence[TokenOut]) -> Agreement:
    """The common beginning of two continuations, and the mean difference of the first logprobs that both name."""
    pairs = zip(exact, packed, strict=False)
    same = next((at for at, (one, other) in enumerate(pairs) if one.token_id != other.token_id), min(len(exact), len(packed)))
    first, second = exact[0].logprobs, packed[0].logprobs
    assert first is not None and second is not None
    others = dict(zip(second.top_ids, second.top_logprobs, strict=True))
    known = [(value, others[token]) for token, value in zip(first.top_ids, first.top_logprobs, strict=True) if token in others]
    return Agreement(same, len(exact), statistics.fmean(abs(one - other) for one, other in known))


def token_agreement(prompts: int) -> list[Row]:
    """Rows of SmolLM2 over passages of the repository's pages."""
    tokens = text_tokens()
    step = (len(tokens) - _PROMPT_TOKENS) // prompts
    passages = [tokens[at * step : at * step + _PROMPT_TOKENS] for at in range(prompts)]
    model_dir, rows = MAKERS["smollm2"](OUT / "models"), []
    exact = continuations(model_dir, passages, Encoding.NONE)
    for encoding in PACKED:
        packed = continuations(model_dir, passages, encoding)
        found = [agreement(exact[name], packed[name]) for name in exact]
        equal = statistics.fmean(one.same_tokens == one.new_tokens for one in found)
        case = f"smollm2 {_DECODE_DTYPE} {encoding.name.lower()}"
        rows += [
            row("prompts with every token equal", case, "", [equal]),
            row("tokens before the first other one", case, f"of {NEW_TOKENS - 1}", [one.same_tokens for one in found]),
            row("error of the first logprobs", case, "nats", [one.logprob_error for one in found]),
        ]
    return rows


def measure(models: Sequence[str], rounds: int, prompts: int) -> list[Row]:
    """All rows."""
    return [*size_and_speed(models, rounds), *token_agreement(prompts)]
