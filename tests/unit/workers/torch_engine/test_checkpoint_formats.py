"""Every layout and number format loads, and agrees with the fp32 original within the error that the format allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.model_card import read_model_card
from configs.native_params import Layout
from protos.contract.errors import ModelError
from tests.support.torch_models import LogitsProbe, a_runner, an_engine, feed, random_tokens, run_all, tensors_of
from workers.engine_api.types import EngineRequest, SamplingParams
from workers.engines.torch.config import read_config
from workers.engines.torch.registry import shapes_of
from workers.engines.torch.tiny import write_tiny
from workers.engines.torch.tiny_files import ENCODINGS, LAYOUTS, Encoding, is_quantised
from workers.engines.torch.weights import open_checkpoint

# Half of the largest step of the format, relative to the largest value that shares its scale; one fp8 scale covers a tensor.
HALF_STEP = {"fp8": 2**-4, "nvfp4": 1 / 6, "int8": 0.5 / 127, "int4": 0.5 / 7}
# Rounding to bf16 moves a value by up to 2^-8 of itself.
BF16 = 2**-8


def loaded(folder: Path) -> dict[str, Tensor]:
    shapes = shapes_of(read_config(folder))
    with open_checkpoint(folder, shapes, torch.float32, torch.device("cpu")) as checkpoint:
        return {name: checkpoint.take(name) for name in shapes}


def logits_of(folder: Path, **engine: Any) -> Tensor:
    runner = a_runner(folder, **engine)
    probe = LogitsProbe(runner)
    feed(runner, random_tokens(3, 60), [20, 40], tuple(range(4)))
    runner.close()
    return torch.cat(probe.seen)


def allowed_error(name: str, original: Tensor, encoding: Encoding) -> Tensor:
    if encoding == "fp32":
        return torch.zeros_like(original)
    if not is_quantised(name, encoding):
        return original.abs() * BF16
    if encoding == "fp8":  # three mantissa bits; below the smallest normal value the step is 2^-9 of a unit
        whole = original.abs().amax()
        return torch.maximum(original.abs() / 16, whole / 448 * 2**-10) * 1.0001
    size = {"nvfp4": 16, "int8": original.shape[-1], "int4": 64 if original.shape[-1] % 64 == 0 else 32}[encoding]
    largest = original.abs().reshape(*original.shape[:-1], -1, size).amax(-1).repeat_interleave(size, -1)
    slack = 1 + 2**-4 if encoding == "nvfp4" else 1.0001  # the block scale is itself rounded to fp8
    return largest * HALF_STEP[encoding] * slack


# Every width is a multiple of 32, which int4 needs.
DIMS: dict[str, dict[str, Any]] = {"mistral-small-4": {"q_lora_rank": 64}, "mistral": {}, "ministral3": {}}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {kind: write_tiny(kind, folder / kind, 5, **dims) for kind, dims in DIMS.items()}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_within_the_error_of_the_format(
    layout: Layout, encoding: Encoding, originals: dict[str, Path], tmp_path: Path
) -> None:
    kind = "mistral-small-4"
    folder = write_tiny(kind, tmp_path / "m", 5, layout=layout, encoding=encoding, shards=3, **DIMS[kind])
    found, original = loaded(folder), tensors_of(originals[kind])
    assert found.keys() == original.keys()
    moved = 0
    for name, tensor in original.items():
        error = (found[name] - tensor).abs()
        assert bool((error <= allowed_error(name, tensor, encoding)).all()), name
        moved += int(is_quantised(name, encoding) and bool(error.any()))
    assert (moved > 0) == (encoding in HALF_STEP)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", DIMS)
def test_logits_follow_the_original_and_do_not_depend_on_the_layout(
    kind: str, encoding: Encoding, originals: dict[str, Path], tmp_path: Path
) -> None:
    folders = [write_tiny(kind, tmp_path / made, 5, layout=made, encoding=encoding, shards=2, **DIMS[kind]) for made in LAYOUTS]
    original = logits_of(originals[kind])
    results = [logits_of(folder) for folder in folders]
    if encoding != "fp8" or kind != "mistral-small-4":  # fused experts share one fp8 scale, separate ones do not
        torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=0)
    exact, found = tensors_of(originals[kind]), loaded(folders[0])
    weight_error = max(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)
    # Errors of independent roundings add up as a random walk over the seven products of each layer and the head.
    bound = (7 * read_config(folders[0]).num_layers + 1) ** 0.5 * weight_error + 1e-5
    for logits in results:
        assert float((logits - original).norm() / original.norm()) <= bound


@pytest.mark.parametrize("encoding", ["fp8", "nvfp4", "int8", "int4"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", DIMS)
def test_compressed_and_decoded_weights_give_the_same_tokens(
    kind: str, layout: Layout, encoding: Encoding, tmp_path: Path
) -> None:
    """The values are the same numbers, so in fp32 only the order of sums differs."""
    folder = write_tiny(kind, tmp_path / "m", 5, layout=layout, encoding=encoding, shards=2, **DIMS[kind])
    torch.testing.assert_close(logits_of(folder), logits_of(folder, weights="decoded"), atol=1e-4, rtol=0)
    requests = [
        EngineRequest(
            request_id=f"r{count}", epoch=1, prompt=random_tokens(count, count), sampling=SamplingParams(max_tokens=24)
        )
        for count in (3, 17, 40)
    ]
    kept, decoded = (run_all(an_engine(folder, weights=weights), requests) for weights in ("stored", "decoded"))
    assert kept == decoded
    assert all(len(tokens) == 24 for tokens in kept.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cards_agree(layout: Layout, originals: dict[str, Path], tmp_path: Path) -> None:
    folder = write_tiny("mistral-small-4", tmp_path / "m", 5, layout=layout, encoding="fp8", **DIMS["mistral-small-4"])
    assert read_model_card(folder) == read_model_card(originals["mistral-small-4"])
    assert read_config(folder) == read_config(originals["mistral-small-4"])


def test_widths_that_do_not_fit_a_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"q_b_proj\.weight has 48 columns"):
        write_tiny("mistral-small-4", tmp_path / "m", 5, encoding="int4")
    with pytest.raises(ModelError, match="no native layout"):
        write_tiny("llama", tmp_path / "m", 5, layout="native")
    with pytest.raises(ModelError, match="900 shards"):
        write_tiny("llama", tmp_path / "m", 5, shards=900)
    assert list(tmp_path.iterdir()) == []
