"""What capacity planning must know of a GPU. Every number names its source; peaks and what is achieved stand apart."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.schema.base import Line, Name, Section

Fraction = Annotated[float, Field(gt=0, le=1)]


class Sourced(Section):
    """A number and where it comes from."""

    value: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
    source: Line


class SourcedFraction(Section):
    """A fraction of a peak and where it comes from."""

    value: Fraction
    source: Line


class Peaks(Section):
    """Vendor's figures, dense. A number format that the GPU cannot multiply is left out."""

    bf16_tflops: Sourced
    fp8_tflops: Sourced | None = None
    int8_tops: Sourced | None = None
    fp4_tflops: Sourced | None = None
    memory_gib: Sourced  # what the driver reports, not the round figure of the name
    memory_tb_per_s: Sourced
    link_gb_per_s: Sourced  # to the other GPUs of the node or domain, one way
    nic_gbit_per_s: Sourced  # of one GPU, to other nodes


class Achieved(Section):
    """What single kernels reach of the peaks, at sizes that favour them; a served step reaches less (see the constants)."""

    gemm_bf16: SourcedFraction
    gemm_fp8: SourcedFraction | None = None
    gemm_int8: SourcedFraction | None = None
    gemm_fp4: SourcedFraction | None = None
    moe: SourcedFraction
    attention: SourcedFraction
    memory: SourcedFraction
    link: SourcedFraction
    nic: SourcedFraction


class Price(Section):
    """Dollars for one GPU and hour: a default, and the range that was seen. Users give their own."""

    default_usd_per_hour: Annotated[float, Field(gt=0, le=1000)]
    low: Annotated[float, Field(gt=0, le=1000)]
    high: Annotated[float, Field(gt=0, le=1000)]
    source: Line


class Hardware(Section):
    """One GPU as it stands in its usual node."""

    name: Name
    title: Line
    aliases: Annotated[tuple[Line, ...], Field(strict=False)] = ()
    generation: Literal["ampere", "ada", "hopper", "blackwell", "cdna3"]
    link: Literal["nvlink", "pcie", "xgmi"]
    gpus_per_domain: Annotated[int, Field(ge=1, le=1024)]  # GPUs that reach each other over `link`
    peaks: Peaks
    achieved: Achieved
    price: Price
