"""`read_facts`: what the files beside somebody's graph say of the model. Knows no kind of graph and no runtime.

generation_config.json, config.json and model_info.json, the first that has a fact; and they must not contradict the
graph. Nothing in the directory is imported or unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanovllm.errors import ModelError

from . import model_info
from .config import Config
from .files import find_file, read_json
from .generation import Default, Source, sampling_defaults, special_ids

CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")  # in config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    name: str
    vocab_size: int | None
    eos_ids: tuple[int, ...]
    bos_id: int | None
    context_length: int | None  # tokens
    sampling_defaults: Mapping[str, Default]  # what the files recommend; not applied


def read_facts(
    directory: Path,
    graph: Path,
    vocab_size: int | None,
    *,
    first: Sequence[Source] = (),
    context_length: int | None = None,
) -> ModelFacts:
    """`vocab_size`: the graph's, None = open; `first`: files of the exporter, which come before the others;
    `context_length`: from those. Raises ModelError naming the file and the key.
    """
    sources, context = list(first), [context_length]
    for name in ("generation_config.json", "config.json", model_info.FILE_NAME):
        if found := find_file(directory, name):
            sources.append((found, read_json(found)))
            if name == "config.json":
                config = Config(sources[-1][1], str(found))
                context += [config.integer(key) for key in CONTEXT if config.get(key) is not None]
    vocab_size = _vocab_size(graph, vocab_size, sources)
    eos_ids = special_ids(sources, "eos_token_id")
    if vocab_size is not None and max(eos_ids, default=0) >= vocab_size:
        origin = next(path for path, values in sources if values.get("eos_token_id") is not None)
        raise ModelError(
            f"{origin}: eos_token_id {max(eos_ids)} is outside of the vocabulary of {vocab_size}", hint="correct it"
        )
    info = model_info.ModelInfo.read(directory) if find_file(directory, model_info.FILE_NAME) else None
    return ModelFacts(
        name=info.model_name if info is not None else model_info.directory_name(directory),
        vocab_size=vocab_size,
        eos_ids=eos_ids,
        bos_id=next(iter(special_ids(sources, "bos_token_id")), None),
        context_length=next((n for n in context if n is not None), None),
        sampling_defaults=sampling_defaults(sources),
    )


def _vocab_size(graph: Path, size: int | None, sources: Sequence[Source]) -> int | None:
    """The graph's, or what a file says where that is open. Raises ModelError if they differ."""
    for path, values in sources:
        said = values.get("vocab_size")
        if said is None:
            continue
        if type(said) is not int or said < 1 or (size is not None and said != size):
            wanted = "a whole number from 1" if size is None else f"{size}, as the graph or another file says"
            raise ModelError(
                f"{path}: vocab_size is {said!r:.30}; it must be {wanted}", hint=f"restore the file of {graph.name}"
            )
        size = said
    return size
