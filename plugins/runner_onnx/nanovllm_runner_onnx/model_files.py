"""`find_onnx_model`: from what `model:` names to one .onnx file, judged, and the facts that lie beside it.

The graph is the one that genai_config.json names; else model.onnx, in the directory or in its `onnx/`, as hubs
lay them out; else the only one there. Facts come from genai_config.json, generation_config.json, config.json and
model_info.json, the first that has one; the graph's own shapes must agree. Nothing in the directory is imported
or unpickled. This file knows no kind of graph and no device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from nanovllm.errors import ModelError
from nanovllm.plugins import model_directory
from nanovllm_models import model_info
from nanovllm_models.checkpoint import EXPECTED as CHECKPOINT
from nanovllm_models.checkpoint import is_checkpoint
from nanovllm_models.facts import ModelFacts, read_facts
from nanovllm_models.files import find_file

from . import genai_config
from .genai_config import GenaiConfig
from .onnx_file import Header, read_header

EXPECTED = (
    "expected tokenizer.json, with genai_config.json and the .onnx file that it names, or with model.onnx, or with "
    f"{CHECKPOINT}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxModel(ModelFacts):
    """A graph and what the files beside it say."""

    path: Path  # of the graph
    directory: Path  # of the model: where tokenizer and configuration files are
    header: Header
    genai: GenaiConfig | None


def find_onnx_model(path: Path) -> OnnxModel | None:
    """The ONNX model at `path`, a graph's file or a model directory; None if the directory holds a checkpoint.

    Raises ModelError if there is nothing, more than one graph to choose from, or something wrong with the files.
    """
    if not path.exists():
        raise ModelError(f"Model directory not found: {path}", hint=EXPECTED)
    directory = model_directory(path)
    config_path = find_file(directory, genai_config.FILE_NAME)
    if path.is_file():
        graph = path
        # A genai_config.json beside another graph than its own says nothing about this one.
        genai = GenaiConfig.read(config_path) if config_path else None
        if genai is not None and genai.filename != path.relative_to(directory).as_posix():
            genai = None
    else:
        if is_checkpoint(directory):
            return None
        genai = GenaiConfig.read(config_path) if config_path else None
        found = _graph_of(genai) if genai is not None else _choose(directory)
        if found is None:
            if find_file(directory, "config.json") or find_file(directory, model_info.FILE_NAME):
                return None  # what it lacks as a checkpoint is for its loader to say
            raise ModelError(f"there is no model in the directory {directory}", hint=EXPECTED)
        graph = found
    header = read_header(graph, directory)
    if genai is not None:
        genai.check(header)
    return _with_facts(graph, directory, header, genai)


def onnx_files(directory: Path) -> list[str]:
    """The graphs of the directory and of its `onnx/`, by name."""
    return sorted(
        p.relative_to(directory).as_posix() for p in (*directory.glob("*.onnx"), *directory.glob("onnx/*.onnx"))
    )


def _graph_of(genai: GenaiConfig) -> Path:
    directory = genai.path.parent
    if (graph := find_file(directory, genai.filename)) is None:
        have = ", ".join(onnx_files(directory)) or "none"
        raise ModelError(
            f"{genai.path}: model.decoder.filename is {genai.filename!r:.100}, which is not there (have: {have})",
            hint="download or export the model again",
        )
    return graph


def _choose(directory: Path) -> Path | None:
    names = onnx_files(directory)
    for usual in ("model.onnx", "onnx/model.onnx"):
        if usual in names:
            return find_file(directory, usual)
    if len(names) > 1:
        raise ModelError(
            f"{directory} has {len(names)} ONNX graphs and no model.onnx: {', '.join(names)}",
            hint=f"choose one, for example model: {directory / names[0]}",
        )
    return find_file(directory, names[0]) if names else None


def _with_facts(graph: Path, directory: Path, header: Header, genai: GenaiConfig | None) -> OnnxModel:
    logits = "logits" if genai is None else genai.outputs["logits"]
    shape = next((value.shape for value in header.outputs if value.name == logits and value.shape), (None,))
    vocab_size = shape[-1] if isinstance(shape[-1], int) else None
    if genai is None:
        facts = read_facts(directory, graph, vocab_size)
    else:
        own = {**genai.search, **genai.tokens, "vocab_size": genai.vocab_size}
        facts = read_facts(directory, graph, vocab_size, first=[(genai.path, own)], context_length=genai.context_length)
    return OnnxModel(path=graph, directory=directory, header=header, genai=genai, **asdict(facts))
