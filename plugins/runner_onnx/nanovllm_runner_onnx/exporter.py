"""`export`: a checkpoint -> a directory with its paged graph, the weights as they are wanted, and the tokenizer.

The graph is the one that the runner builds, so what was exported computes what the checkpoint does, to the bit.
Equal checkpoints give equal files. Weights are converted and written one at a time. Knows no session.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import ValidationError

from nanovllm.errors import ConfigError, ModelError
from nanovllm.hookspecs import CacheOptions
from nanovllm.plugins import resolve_model
from nanovllm_models import load_checkpoint
from nanovllm_models.files import COMPANIONS, find_file

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

    _, directory = resolve_model(str(model))
    checkpoint = load_checkpoint(directory or model)
    positions = checkpoint.spec.max_positions
    max_len = positions if max_length is None else max_length
    if not 1 <= max_len <= positions:
        raise ConfigError(
            f"max_length is {max_len}, but {checkpoint.name} has {positions} positions", hint=f"give 1 to {positions}"
        )
    target = Path(output).expanduser().resolve()
    _check_place(target, checkpoint.path, force)
    precision = precision_of(options, options.device)
    facts = Facts.of(checkpoint.spec, max_len, block_size, precision, options.device)

    # 2. All files, in a directory beside that one.
    with _directory(target) as part:
        with (part / DATA).open("wb") as file:
            data = DataFile(file, DATA, tell)
            graph = build_decoder(
                checkpoint.spec, checkpoint.weights, max_len, block_size, precision, options.device, data
            )
        graph.metadata[PROPERTY] = facts.model_dump_json()
        (part / GRAPH).write_bytes(graph.model())
        for path in sorted(checkpoint.path.iterdir()):
            is_companion = any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS)
            if is_companion and (source := find_file(checkpoint.path, path.name)):
                shutil.copyfile(source, part / path.name)
        checkpoint.info.write(part)
    return target


def _check_place(target: Path, source: Path, force: bool) -> None:
    """Raises ConfigError if something is there that must not be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is not a directory", hint="choose another --output")
    if not any(target.iterdir()):
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


@contextmanager
def _directory(target: Path) -> Iterator[Path]:
    """A new directory that takes the place of `target` in the end; if anything fails, nothing is left of it."""
    part, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}") for kind in ("part", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        if target.exists():
            target.rename(old)
        part.rename(target)
    except OSError as e:
        raise ConfigError(f"{target} cannot be written: {e}", hint="make room, or choose another --output") from e
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
