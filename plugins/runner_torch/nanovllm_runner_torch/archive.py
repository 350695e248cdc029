"""Programs that torch wrote, opened only where the user allowed it.

A TorchScript archive carries a program, part of which runs while it is opened. A torch.export archive may carry a
pickle or compiled code, and torch falls back to unpickling without limits. So `open_archive` is the one place of this
project that opens either, and it asks `allow_code_in` first. `find_archive` runs nothing and does not need torch.
Knows no signature and no model.
"""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ConfigError, ModelError
from nanovllm.plugins import model_directory
from nanovllm_models.checkpoint import is_checkpoint
from nanovllm_models.files import parse_json
from nanovllm_models.torch_files import KINDS, NOTE, find_program, judge

if TYPE_CHECKING:
    import torch

WHY = {
    "torchscript": "it carries a program, which may run as soon as the file is opened",
    "pt2": "it may carry a pickle or compiled code, and torch.export falls back to unpickling, which can run anything",
}


@dataclass(frozen=True, slots=True)
class Archive:
    path: Path  # the file itself, links followed
    kind: str  # of KINDS
    directory: Path  # where config.json and the tokenizer's files are
    max_len: int | None = None  # tokens that it was exported for, where our exporter noted it


def find_archive(path: Path) -> Archive | None:
    """The archive at `path`, a file or a model directory; None if the directory holds none, or a checkpoint.

    Raises ModelError as `judge` does, and for a directory with both kinds.
    """
    found = path
    if path.is_dir():
        program = None if is_checkpoint(path) else find_program(path)
        if program is None:
            return None
        found = program
    kind, note = judge(found)
    return Archive(found.resolve(), kind, model_directory(path), _max_len(found, note))


def _max_len(path: Path, note: bytes | None) -> int | None:
    if note is None:
        return None
    value: Any = parse_json(note, f"{NOTE} in {path}").get("max_length")
    if type(value) is not int or value < 1:
        raise ModelError(
            f"{NOTE} in {path}: max_length is {value!r:.40}, not a number of tokens", hint="export it again"
        )
    return value


def note_of(max_len: int) -> str:
    """What `find_archive` reads again."""
    return json.dumps({"max_length": max_len})


def open_archive(
    archive: Archive, allow_code_in: Sequence[Path], device: torch.device
) -> torch.jit.ScriptModule | torch.export.ExportedProgram:
    """The model on the device, with whatever runs when torch opens it.

    Raises ConfigError if the file itself lies in none of the places `allow_code_in`, ModelError if torch cannot
    open it.
    """
    path = check_allowed(archive.path, allow_code_in, KINDS[archive.kind], WHY[archive.kind])
    import torch
    from torch.export.passes import move_to_device_pass

    try:
        if archive.kind == "torchscript":
            with torch_jit_warns_of_its_age():
                return torch.jit.load(path, map_location=device)
        return move_to_device_pass(torch.export.load(path), device)
    except Exception as e:  # whatever is wrong inside: torch has no type of error for that
        text = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ModelError(
            f"torch {torch.__version__} cannot open {path}: {text:.200}",
            hint="export it again with this version of torch",
        ) from e


def check_allowed(path: Path, allow_code_in: Sequence[Path], what: str, why: str, option: str | None = None) -> Path:
    """The real file at `path`, links followed, which is what is to be opened.

    Raises ConfigError unless it is or lies in one of the places, links followed. `option`: the command line's way to
    allow it, where that is not the configuration's.
    """
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: a loop of links, before Python 3.13
        raise ModelError(f"{path} cannot be opened: {e}", hint="check what it leads to") from e
    if any(real.is_relative_to(_real_place(place)) for place in allow_code_in):
        return real
    places = ", ".join(map(str, allow_code_in)) or "none"
    line = f"{option} {shlex.quote(str(real.parent))}" if option else f"allow_code_in: [{json.dumps(str(real.parent))}]"
    raise ConfigError(
        f"{real} is {what}: {why}; only files in places that you allowed are opened (now: {places})",
        hint=f"if you trust who made it, add `{line}`" + ("" if option else " to `runner:`"),
    )


def _real_place(place: Path) -> Path:
    try:
        return place.expanduser().resolve()
    except (OSError, ValueError, RuntimeError) as e:  # NUL, a loop of links, nobody's home
        raise ConfigError(f"{str(place)!r} is no place that code can be allowed in: {e}", hint="correct it") from e


@contextmanager
def torch_jit_warns_of_its_age() -> Iterator[None]:
    """Without torch's warnings that TorchScript is deprecated, which say nothing about the model."""
    with warnings.catch_warnings():
        pattern = r"`torch\.jit\.\w+` is (deprecated|not supported)"
        warnings.filterwarnings("ignore", pattern, DeprecationWarning)
        yield
