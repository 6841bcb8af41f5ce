"""The cost of encoding images: a step of the encoder on one GPU."""

from __future__ import annotations

from configs.schema.model_description import Vision
from orchestrator.costs.constants import Constants
from orchestrator.costs.number import Number
from orchestrator.costs.shape import GpuRates
from orchestrator.costs.step import EngineCosts, Operator, StepCost, overlapped

KERNELS_PER_LAYER = 9


def image_patches(vision: Vision, width_pixels: int, height_pixels: int) -> int:
    """Patches of an image, both sides rounded up to whole tokens."""
    side = vision.patch_pixels * vision.merge
    return -(-width_pixels // side) * -(-height_pixels // side) * vision.merge**2


def encode_cost(
    vision: Vision, rates: GpuRates, patches: Number, images: Number, constants: Constants, engine: EngineCosts
) -> StepCost:
    """Encodes `images` of `patches` each in one step, in bf16: attention stays within an image, weights are read once."""
    tower = vision.layers * (4.0 * vision.hidden**2 + (3.0 if vision.gated else 2.0) * vision.hidden * vision.width)
    projector = vision.params - tower
    flops = 2.0 * images * patches * (tower + projector / vision.merge**2)
    size = 2.0 * vision.params
    memory = size / (rates.memory_bytes_per_s * rates.memory_achieved * constants["weight_memory"])
    compute = flops / (rates.bf16_flops * rates.bf16_achieved * constants["gemm_compute"])
    pairs = 4.0 * vision.layers * vision.hidden * images * patches * patches
    attention = pairs / (rates.bf16_flops * rates.attention_achieved * constants["attention_compute"])
    peak = rates.bf16_flops
    operators = (
        Operator(
            name="encoder",
            seconds=overlapped(memory, compute, constants["overlap_power"]),
            flops=flops,
            bytes=size,
            peak_flops=peak,
        ),
        Operator(name="encoder_attention", seconds=attention, flops=pairs, peak_flops=peak),
        Operator(name="launch", seconds=vision.layers * KERNELS_PER_LAYER * engine.kernel_s),
        Operator(name="host", seconds=engine.step_s + engine.sequence_s * images),
    )
    return StepCost(operators=operators, memory_bytes_per_s=rates.memory_bytes_per_s, link_bytes_per_s=rates.link_bytes_per_s)
