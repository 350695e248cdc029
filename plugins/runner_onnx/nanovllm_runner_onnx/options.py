"""What `runner: {type: onnx, ...}` may say, beside `threads`, which belongs to every runner."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator


class OnnxOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    providers: list[str] = Field(
        default=["cpu"], min_length=1, description="ONNX Runtime's execution providers, all of them required: cpu"
    )
    weights: str = Field(default="fp32", description="precision of the weights in memory: fp32")

    @field_validator("weights")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in ("fp16", "int8", "int4"):
            raise ValueError(f"{value} comes in a later version; this one computes with fp32 weights")
        if value != "fp32":
            raise ValueError("must be fp32")
        return value
