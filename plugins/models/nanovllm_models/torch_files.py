"""Files that torch writes, told apart by the names inside them: programs, and pickled weights.

A zip's list of names is read, and a short note that this project's own exporter leaves; nothing is opened by torch,
unpickled or run, and torch is not imported. Knows no signature and no model.
"""

from __future__ import annotations

import shlex
import struct
import zipfile
import zlib
from pathlib import Path

from nanovllm.errors import ModelError, UnsupportedModelError

from .files import find_file

PROGRAMS = ("model.pt2", "model.pt")  # in a directory
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # suffixes
KINDS = {"torchscript": "a TorchScript archive", "pt2": "a torch.export archive"}
NOTE = "nanovllm.json"  # our exporter's, among the extra files of an archive
MAX_NOTE_BYTES = 1 << 16
_BAD_ZIP = (
    zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError, OverflowError,
    MemoryError,
)  # fmt: skip


def find_program(directory: Path) -> Path | None:
    """The file that is a program by its name. Raises ModelError for both, and as `find_file` does."""
    there = [file for name in PROGRAMS if (file := find_file(directory, name)) is not None]
    if len(there) > 1:
        raise ModelError(
            f"{directory} has both {' and '.join(PROGRAMS)}", hint=f"choose one, for example model: {there[0]}"
        )
    return there[0] if there else None


def judge(path: Path) -> tuple[str, bytes | None]:
    """What the file is, one of KINDS; and our exporter's note, if it has one.

    Raises UnsupportedModelError for a pickle and for an archive that torch.export.load would not read, ModelError for
    a file that torch does not write, or that is damaged.
    """
    kind, note = look_into(path)
    if kind == "pickle":
        raise UnsupportedModelError(
            f"{path} is a pickle, which can run anything when it is read, and nothing is ever unpickled here",
            hint=conversion_hint(path),
        )
    if kind not in KINDS:
        raise UnsupportedModelError(f"{path} is {kind}", hint="write one with `nanovllm export pt2`")
    return kind, note


def look_into(path: Path) -> tuple[str, bytes | None]:
    """As `judge`, but of everything that torch writes: "pickle", one of KINDS, or in words something else."""
    if path.exists() and not path.is_file():
        raise ModelError(f"{path} is not a regular file", hint="give the file of a model")
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}", hint="check its permissions") from e
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":  # how a pickle of protocol 2 to 5 begins
        return "pickle", None
    if head != b"PK\3\4":
        raise ModelError(
            f"{path} is no file that torch writes: it begins with {head!r}",
            hint="give a directory with config.json and model.safetensors, or the file of an exported model",
        )
    try:
        with zipfile.ZipFile(path) as members:
            return _look_into(members)
    except _BAD_ZIP as e:
        raise ModelError(
            f"{path} is damaged or cut short: {str(e) or type(e).__name__}", hint="export or download it again"
        ) from e


def _look_into(members: zipfile.ZipFile) -> tuple[str, bytes | None]:
    names = set(members.namelist())
    root = members.namelist()[0].partition("/")[0] if names else ""  # all names of an archive lie under it

    def content(name: str) -> bytes | None:
        if f"{root}/{name}" not in names:
            return None
        info = members.getinfo(f"{root}/{name}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile(f"{info.filename} is compressed in a way that torch does not know")
        with members.open(info) as file:
            return file.read(MAX_NOTE_BYTES)

    if f"{root}/constants.pkl" in names:  # how torch tells them apart
        kind = "torchscript"
    elif content("archive_format") == b"pt2":
        is_program = f"{root}/models/model.json" in names
        kind = "pt2" if is_program else "a torch archive without an exported program called 'model'"
    elif f"{root}/data.pkl" in names:
        kind = "pickle"
    elif "serialized_exported_program.json" in names:
        kind = "of torch.export's format before torch 2.8, which is read by unpickling it"
    else:
        kind = "a zip file that torch did not write"
    return kind, content(f"extra/{NOTE}")


def conversion_hint(path: Path) -> str:
    """How pickled weights, a file or a directory with them, become safetensors."""
    place = (path if path.is_dir() else path.parent).resolve()
    options = {"model": path, "output": f"{place}-safetensors", "allow-code-in": place}
    command = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
    return f"if you trust who made it, convert it: nanovllm export safetensors {command} (needs nanovllm[torch])"
