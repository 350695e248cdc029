"""What `runner: {type: torch, ...}` may say, beside `threads`, which belongs to every runner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


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
    allow_code_in: tuple[Annotated[Path, Field(strict=False)], ...] = Field(
        default=(),
        strict=False,
        description="exported models are opened in these places only, because what they hold may run: full paths",
    )

    @field_validator("allow_code_in")
    @classmethod
    def _is_the_same_wherever_it_is_read(cls, places: tuple[Path, ...]) -> tuple[Path, ...]:
        for place in places:
            if not place.is_absolute() and place.parts[:1] != ("~",):
                raise ValueError("must be full paths, which begin with / or ~/")
        return places
