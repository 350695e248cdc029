"""`export`: a checkpoint -> a directory with its paged graph, the weights as they are wanted, and the tokenizer.

The graph is the one that the runner builds, so what was exported computes what the checkpoint does, to the bit.
Equal checkpoints give equal files. Weights are converted and written one at a time. Knows no session.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from nanovllm.errors import ConfigError, ModelError
from nanovllm.hookspecs import CacheOptions
from nanovllm_models.export_files import copy_companions, directory_for, find_place, is_free, open_source

from .exported import PROPERTY, Facts
from .install import require_onnx
from .onnx_file import read_header
from .options import OnnxOptions
from .paged_model import precision_of

GRAPH, DATA = "model.onnx", "model.onnx.data"


def export(
    model: str | Path,
    output: str | Path,
    *,
    weights: str | None = None,
    int4_block: int | None = None,
    max_length: int | None = None,
    block_size: int = CacheOptions().block_size,
    device: str = "cpu",
    force: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the directory `output`, whole or not at all, and return its path.

    `model` is a checkpoint's directory, or `demo`. `weights` (fp32, fp16, int8, int4), `int4_block` (32, 128) and
    `device` (cpu, cuda, directml) mean what they mean in the runner's options, `block_size` what it does in
    `cache:`. `max_length` tokens of a prompt and its answer at most, by default as many as the model has
    positions. `force` replaces an earlier export. `tell` gets the name of each weight before it is written.

    Raises ConfigError for a wish that cannot be met and a place that cannot be written, ModelError for a
    checkpoint that cannot be used, PluginError if a package is missing.
    """
    # 1. What is wanted, and whether there is a place for it.
    try:
        options = OnnxOptions(device=device, weights=weights, int4_block=int4_block)  # type: ignore[arg-type]
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {what}, not {first['input']!r:.40}" if where else what) from None
    if block_size < 1:
        raise ConfigError(f"block_size is {block_size}; it must be at least 1")
    require_onnx()
    from .decoder import build_decoder
    from .graph import DataFile

    checkpoint, max_len = open_source(str(model), max_length)
    target = find_place(output)
    _check_free(target, checkpoint.path, force)
    precision = precision_of(options, options.device)
    facts = Facts.of(checkpoint.spec, max_len, block_size, precision, options.device)

    # 2. All files, in a directory beside that one.
    with directory_for(target) as part:
        with (part / DATA).open("wb") as file:
            data = DataFile(file, DATA, tell)
            graph = build_decoder(
                checkpoint.spec, checkpoint.weights, max_len, block_size, precision, options.device, data
            )
        graph.metadata[PROPERTY] = facts.model_dump_json()
        (part / GRAPH).write_bytes(graph.model())
        copy_companions(checkpoint.path, part)
        checkpoint.info.write(part)
    return target


def _check_free(target: Path, source: Path, force: bool) -> None:
    """Raises ConfigError if something is there that must not be replaced."""
    if is_free(target):
        return
    if not force:
        raise ConfigError(f"{target} is not empty", hint="choose another --output, or replace it with --force")
    if not _is_export(target) or source.resolve().is_relative_to(target):
        raise ConfigError(f"{target} holds no export that --force could replace", hint="choose another --output")


def _is_export(directory: Path) -> bool:
    try:
        return PROPERTY in read_header(directory / GRAPH, directory).metadata
    except ModelError:  # none, or one that is damaged: not ours to remove
        return False
