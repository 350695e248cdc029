"""What can be said of a model that is an ONNX graph: asked of the package that runs such graphs.

It registers `onnx` in the entry-point group `nanovllm.inspectors`, a function `(Path) -> Inspection` of a graph's
file or a model directory. This file imports no runner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.doctor.finding import Finding
from nanovllm.loader import load_object
from nanovllm.plugins import find

from .checkpoint import is_checkpoint
from .generation import Source
from .inspect_files import FoundFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    tables: Mapping[str, Mapping[str, str]]  # title -> label -> text, for people
    data: Mapping[str, Any]  # the same as plain values, for JSON
    vocab_size: int | None
    sources: tuple[Source, ...]  # of end tokens and sampling defaults; they win over the other files
    findings: tuple[Finding, ...]


def is_graph(path: Path, files: Sequence[FoundFile]) -> bool:
    """Is a graph what would run? `files`: those of the directory. A checkpoint beside it would run instead."""
    named = any(file.name.endswith((".onnx", "genai_config.json")) for file in files)
    return path.is_file() or (named and not is_checkpoint(path))


def inspect_graph(path: Path) -> Inspection:
    """Raises PluginError with the pip line if nobody can read graphs, ModelError for what is wrong with the model."""
    inspection: Inspection = load_object(find("inspectors", "onnx"))(path)
    return inspection
