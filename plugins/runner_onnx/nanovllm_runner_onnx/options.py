"""What `runner: {type: onnx, ...}` may say, beside `threads`, which belongs to every runner.

Words only: what this machine's ONNX Runtime can do about them is `session.py`'s matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Device = Literal["cpu", "cuda", "directml"]
LONG_NAMES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda", "DmlExecutionProvider": "directml"}
_SPELLINGS = {name: name for name in get_args(Device)} | {long.lower(): name for long, name in LONG_NAMES.items()}
_SPELLINGS["dml"] = "directml"

Scalar = bool | int | float | str


class OnnxOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    device: Device = Field(
        default="cpu", description="where the model runs, and nowhere else: cpu, cuda, directml (or dml)"
    )
    fallback: list[Literal["cpu"]] = Field(
        default=[], description="where it may run instead, or in parts, if the device cannot; logged. Only cpu"
    )
    providers: list[Device] | None = Field(
        default=None, min_length=1, description="another spelling of device and fallback: [CUDA, CPU]"
    )
    weights: Literal["fp32", "fp16", "int8", "int4"] | None = Field(
        default=None, description="precision of a checkpoint's weights in memory; default fp32 on the cpu, else fp16"
    )
    int4_block: Literal[32, 128] | None = Field(
        default=None, description="weights that share a scale, with weights: int4; default 32"
    )
    spinning: bool = Field(
        default=True,
        description="threads wait for work busily for a moment; false frees the cores and costs about 1 ms a step",
    )
    provider_options: dict[str, Scalar] = Field(default={}, description="of the device's provider: device_id, ...")
    session_options: dict[str, Scalar] = Field(
        default={}, description="of the session: attributes of SessionOptions and keys such as session.*"
    )
    custom_ops: list[str] = Field(
        default=[], description="libraries of custom operators to load. They are native code: name only trusted ones"
    )

    @model_validator(mode="before")
    @classmethod
    def _device_of_providers(cls, data: Any) -> Any:
        """`providers: [cuda, cpu]` says device: cuda, fallback: [cpu]; saying both is fine if they agree."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        named = data.get("providers")
        if isinstance(named, list) and named:
            names = [_device(name) for name in named]
            for key, said in (("device", names[0]), ("fallback", names[1:])):
                given = data.setdefault(key, said)
                if (_device(given) if key == "device" else _devices(given)) != said:
                    raise ValueError(f"{key}: {given} contradicts providers: {named}; give only one of them")
        return data

    @model_validator(mode="after")
    def _block_of_int4(self) -> OnnxOptions:
        if self.int4_block is not None and self.weights != "int4":
            raise ValueError("int4_block means something only with weights: int4")
        return self

    @field_validator("device", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return _device(value)

    @field_validator("fallback", "providers", mode="before")
    @classmethod
    def _many(cls, value: Any) -> Any:
        return _devices(value)

    @field_validator("provider_options", "session_options", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """ONNX Runtime's names have dots, at which a configuration nests its keys."""
        return dict(_leaves(value)) if isinstance(value, dict) else value


def _leaves(tree: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from ((f"{key}.{rest}", leaf) for rest, leaf in _leaves(value))
        else:
            yield key, value


def _device(name: Any) -> Any:
    """Our name of what is written in any case, short or as ONNX Runtime's provider; others are left as they are."""
    return _SPELLINGS.get(name.lower(), name) if isinstance(name, str) else name


def _devices(names: Any) -> Any:
    return [_device(name) for name in names] if isinstance(names, list) else names
