"""What `runner: {type: torch, ...}` may say, beside `threads`, which belongs to every runner."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TorchOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$", description="auto, cpu, cuda or cuda:N; never another"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="what is computed in; auto: bf16 where the device computes in it, else fp32"
    )
    weights: Literal["auto", "int8"] = Field(
        default="auto", description="auto: linear weights are held as dtype; int8: products of 8-bit integers, CPU only"
    )
