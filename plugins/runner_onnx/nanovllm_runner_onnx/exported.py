"""`Facts`: what there is to know to run a paged graph, and how they travel in an exported model.

An exported model carries them as JSON in one metadata property, by which it is recognised: no name of
a file matters. This file knows no session and no checkpoint.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nanovllm.errors import ModelError
from nanovllm_models import DecoderSpec, Experts
from nanovllm_models.files import parse_json

from .model_files import OnnxModel
from .options import Device
from .precision import Precision, float_type
from .step import input_name

PROPERTY = "nanovllm.paged"  # of the model's metadata
FORMAT: Literal[1] = 1  # of the facts, and of the graph's inputs and outputs as this version binds them

Count = Annotated[int, Field(ge=1, lt=2**31)]


class Facts(BaseModel):
    """Of a graph that `build_decoder` made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = FORMAT
    architecture: str
    num_parameters: Annotated[int, Field(ge=1)]
    vocab_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_size: Count
    windows: Annotated[tuple[Count | None, ...], Field(min_length=1)]  # each once, in the order of the layers
    max_len: Count  # positions
    block_size: Count  # tokens
    weights: Literal["fp32", "fp16", "int8", "int4"]
    int4_block: Literal[32, 128] | None  # None where the weights are not int4
    has_experts: bool
    device: Device

    @classmethod
    def of(cls, spec: DecoderSpec, max_len: int, block_size: int, precision: Precision, device: Device) -> Facts:
        """Of the graph that `build_decoder` makes of these."""
        attention = spec.attention
        return cls(
            architecture=spec.architecture,
            num_parameters=spec.num_parameters,
            vocab_size=spec.vocab_size,
            num_layers=spec.num_layers,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_size=attention.head_size,
            windows=tuple(dict.fromkeys(attention.windows)),
            max_len=max_len,
            block_size=block_size,
            weights=precision.weights,
            int4_block=precision.block if precision.weights == "int4" else None,
            has_experts=any(isinstance(mlp, Experts) for mlp in spec.mlps),
            device=device,
        )

    @property
    def kv_size(self) -> int:
        """Numbers of K and V of one token, in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size


def is_exported(model: OnnxModel) -> bool:
    """Is it one of ours?"""
    return PROPERTY in model.header.metadata


def read_facts(model: OnnxModel) -> Facts:
    """What a model of ours says of itself.

    Raises ModelError if the facts are damaged, of a newer format, or not those of the graph beside them.
    """
    text = model.header.metadata[PROPERTY]
    what = f"the property {PROPERTY} of {model.path}"
    written = parse_json(text.encode(), what).get("format")
    if type(written) is int and written > FORMAT:
        raise ModelError(
            f"{model.path} was exported by a newer nanovllm (format {written}; this one reads {FORMAT})",
            hint="try: pip install --upgrade nanovllm-runner-onnx",
        )
    try:
        facts = Facts.model_validate_json(text)
    except ValidationError as e:
        first = e.errors()[0]
        raise ModelError(
            f"{what} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint="export the model again"
        ) from None
    _compare(facts, model)
    return facts


def _compare(facts: Facts, model: OnnxModel) -> None:
    """Raises ModelError where the graph's inputs and outputs are not what the facts say."""
    inputs = {value.name: value for value in model.header.inputs}
    logits = next((value.shape for value in model.header.outputs if value.name == "logits"), ())
    pools = [value for name, value in inputs.items() if name.startswith(("k.", "v."))]
    tables = {name for name in inputs if name.startswith("decode.tables.")}  # CUDA's attention knows its windows
    dtype = np.dtype(float_type(Precision(facts.weights), facts.device)).name
    seen = {
        "num_layers": len(pools) == 2 * facts.num_layers
        and all(f"{kind}.{i}" in inputs for kind in "kv" for i in range(facts.num_layers)),
        "head_size": all(pool.shape[-1:] == (facts.head_size,) for pool in pools),
        "vocab_size": logits[-1:] == (facts.vocab_size,),
        "device": bool(tables) == (facts.device != "cuda") and all(pool.dtype == dtype for pool in pools),
        "windows": not tables or tables == {input_name("tables", "decode", window) for window in facts.windows},
    }
    for key, is_so in seen.items():
        if not is_so:
            raise ModelError(
                f"{model.path} says {key} = {getattr(facts, key)} of itself, but its graph is another",
                hint="export the model again",
            )
