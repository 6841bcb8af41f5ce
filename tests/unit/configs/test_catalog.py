"""The catalog of models and GPUs: complete, sourced, found by any of its names."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.catalog.loader import hardware, hardware_named, model_named, models, read_description
from configs.schema.hardware import Hardware
from configs.schema.model_description import ModelDescription
from protos.contract.errors import ConfigError

NAMED_MODELS = {
    "mistral-small-4",
    "mistral-small-3.2",
    "gpt-oss-120b",
    "qwen3.5-122b-a10b",
    "nemotron-3-super",
    "deepseek-v3",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "qwen3-32b",
    "qwen3-235b-a22b",
}
NAMED_GPUS = {"h100", "h200", "b200", "gb200", "a100", "l40s", "mi300x", "rtx4090", "rtxpro6000"}


def test_what_was_promised_is_there_under_its_file_name() -> None:
    assert set(models()) >= NAMED_MODELS
    assert set(hardware()) == NAMED_GPUS
    assert all(name == model.name for name, model in models().items())
    assert all(name == gpu.name for name, gpu in hardware().items())


def test_no_name_means_two_things() -> None:
    for described in (models().values(), hardware().values()):
        names = [name.lower() for one in described for name in (one.name, *one.aliases)]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("gpu", hardware().values(), ids=lambda gpu: gpu.name)
def test_peaks_are_of_this_century_and_ordered(gpu: Hardware) -> None:
    peaks = gpu.peaks
    assert 100 < peaks.bf16_tflops.value < 5000
    if peaks.fp8_tflops:
        assert peaks.fp8_tflops.value == pytest.approx(2 * peaks.bf16_tflops.value, rel=0.02)
    if peaks.fp4_tflops and peaks.fp8_tflops:
        assert peaks.fp4_tflops.value == pytest.approx(2 * peaks.fp8_tflops.value, rel=0.02)
    assert 0.5 < peaks.memory_tb_per_s.value < 10
    assert peaks.link_gb_per_s.value * 8 > peaks.nic_gbit_per_s.value
    assert gpu.price.low <= gpu.price.default_usd_per_hour <= gpu.price.high
    assert (peaks.fp8_tflops is None) == (gpu.achieved.gemm_fp8 is None)
    assert (peaks.fp4_tflops is None) == (gpu.achieved.gemm_fp4 is None)


def test_found_by_repository_and_by_benchmark_name() -> None:
    assert model_named("meta-llama/Llama-3.1-8B-Instruct").name == "llama-3.1-8b"
    assert model_named("nvidia/Llama-3.1-8B-Instruct-FP8").name == "llama-3.1-8b"
    assert model_named("nvidia/DeepSeek-R1-0528-FP4-v2").name == "deepseek-v3"
    assert model_named("moonshotai/Kimi-K2-Thinking").name == "kimi-k2.5"
    assert model_named("moonshotai/Kimi-K2-Instruct-0905").name == "kimi-k2"
    assert hardware_named("h100_sxm").name == "h100"


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"mistral-smal-4: no such model \(did you mean mistral-small-4\?\)"):
        model_named("mistral-smal-4")
    with pytest.raises(ConfigError, match=r"no such GPU .known: "):
        hardware_named("abacus")


def test_a_bad_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("name: x\ntitle: x\nsource: x\nhidden: 0\nvocab: 10\ncontext_tokens: 10\nblocks: []\nwidth: 3\n")
    with pytest.raises(ConfigError) as refused:
        read_description(path, ModelDescription)
    said = str(refused.value)
    assert f"{path}:4: hidden" in said
    assert f"{path}:7: blocks" in said
    assert f"{path}:8: width" in said
    with pytest.raises(ConfigError, match="cannot be read"):
        read_description(tmp_path / "none.yaml", ModelDescription)
