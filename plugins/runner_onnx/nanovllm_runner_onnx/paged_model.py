"""`PagedModel`: a paged graph and what there is to know of it, built from a checkpoint or opened from a file.

The runner sees no difference between the two. Knows no step and no pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanovllm.errors import ConfigError
from nanovllm.hookspecs import Context
from nanovllm_models import load_checkpoint, model_len

from .exported import Facts, read_facts
from .options import Device, OnnxOptions
from .precision import Precision
from .session import SessionSettings, open_session

if TYPE_CHECKING:
    import onnxruntime as ort  # type: ignore[import-untyped]

    from .model_files import OnnxModel


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedModel:
    facts: Facts
    max_model_len: int  # tokens, prompt and answer: at most facts.max_len
    eos_ids: tuple[int, ...]
    about: Mapping[str, object]  # for people
    open: Callable[[], tuple[ort.InferenceSession, int]]  # and the bytes of its weights


def from_checkpoint(ctx: Context, settings: SessionSettings) -> PagedModel:
    """The graph is built when the model is opened. Raises ModelError, and ConfigError for what cannot be met."""
    checkpoint = load_checkpoint(ctx.path or ctx.model)
    spec, block_size = checkpoint.spec, ctx.cache.block_size
    max_len = model_len(checkpoint.name, spec.max_positions, ctx.max_model_len)
    precision = precision_of(ctx.options, settings.device)

    def build() -> tuple[ort.InferenceSession, int]:
        from .decoder import build_decoder  # imports onnx

        graph = build_decoder(spec, checkpoint.weights, max_len, block_size, precision, settings.device)
        return open_session(graph.model(), settings, graph.weights), graph.weight_bytes

    return PagedModel(
        facts=Facts.of(spec, max_len, block_size, precision, settings.device),
        max_model_len=max_len,
        eos_ids=checkpoint.eos_ids,
        about={**checkpoint.facts, "dtype": f"{checkpoint.dtype} in the file, {precision.weights} in memory"},
        open=build,
    )


def from_file(ctx: Context, model: OnnxModel, settings: SessionSettings) -> PagedModel:
    """Raises ModelError for a damaged export, ConfigError for a wish that it does not meet."""
    facts, options = read_facts(model), ctx.options
    if settings.fell_back and settings.device != facts.device:
        raise ConfigError(
            f"{model.path} was exported for {facts.device} and cannot fall back: {settings.fell_back}",
            hint=f"export the model again with --device {settings.device}",
        )
    for key, flag, wished, made in (
        ("runner.device", "--device", settings.device, facts.device),
        ("runner.weights", "--weights", options.weights or facts.weights, facts.weights),
        ("runner.int4_block", "--int4-block", options.int4_block or facts.int4_block, facts.int4_block),
        ("cache.block_size", "--block-size", ctx.cache.block_size, facts.block_size),
    ):
        if wished != made:
            raise ConfigError(
                f"{key} is {wished}, but {model.path} was exported with {made}",
                hint=f"set {key} to {made}, or export the model again with {flag} {wished}",
            )
    max_len = ctx.max_model_len or facts.max_len
    if max_len > facts.max_len:
        raise ConfigError(
            f"max_model_len is {max_len}, but {model.path} was exported for {facts.max_len} positions",
            hint=f"set max_model_len to {facts.max_len} or less, or export the model again with --max-length {max_len}",
        )

    def load() -> tuple[ort.InferenceSession, int]:
        return open_session(model.path, settings), model.header.weight_bytes

    return PagedModel(
        facts=facts,
        max_model_len=max_len,
        eos_ids=model.eos_ids,
        about={
            "model": model.name,
            "architecture": facts.architecture,
            "layers": facts.num_layers,
            "parameters": facts.num_parameters,
            "generation_defaults": {name: d._asdict() for name, d in model.sampling_defaults.items()},
            "dtype": f"{facts.weights} in the file and in memory",
        },
        open=load,
    )


def precision_of(options: OnnxOptions, device: Device) -> Precision:
    """What the options say, or the default of the device."""
    return Precision(options.weights or ("fp32" if device == "cpu" else "fp16"), options.int4_block or 32)
