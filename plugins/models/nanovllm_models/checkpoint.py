"""`load_checkpoint`: a Hugging Face model directory -> the spec, its weights and its facts.

One loader for all families; what differs between them is data (`families/`). Reads config.json,
generation_config.json, model_info.json and safetensors files, sharded or not. Nothing is unpickled
or imported from the directory, and no tensor's data is read: weights are views into memory maps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanovllm.errors import ModelError, UnsupportedModelError

from . import generation, model_info
from .config import Config
from .files import find_file, read_json
from .generation import Default, sampling_defaults, special_ids
from .layout import canonical_weights, some
from .model_info import ModelInfo
from .registry import find_family
from .spec import DecoderSpec
from .torch_files import PICKLED, conversion_hint, find_program
from .weights_file import Tensor, open_weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPECTED = f"config.json and {SINGLE} (or {INDEX} and its shards)"
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What `load_checkpoint` found. Weights are views into the mapped files: nothing is read before it is used."""

    path: Path  # the directory
    spec: DecoderSpec
    weights: Mapping[str, Tensor]  # canonical name -> view; exactly the names of spec.shapes()
    info: ModelInfo
    eos_ids: tuple[int, ...]  # generation_config.json, else config.json, else model_info.json
    bos_id: int | None
    sampling_defaults: Mapping[str, Default]  # what the files recommend; not applied
    dtype: str  # the weights' (most frequent) type in the file: float32, bfloat16, ...

    @property
    def name(self) -> str:
        """For people: of model_info.json, else the directory's."""
        return self.info.model_name

    @property
    def facts(self) -> dict[str, object]:
        """What any runner says of it in `RunnerInfo.description`; how it is held in memory is the runner's to add."""
        return {
            "model": self.name,
            "architecture": self.spec.architecture,
            "layers": self.spec.num_layers,
            "parameters": self.num_parameters,
            "generation_defaults": {name: d._asdict() for name, d in self.sampling_defaults.items()},
        }

    @property
    def num_parameters(self) -> int:
        """Counted in the file; `spec.num_parameters` is the same by formula."""
        return sum(t.array.size for t in self.weights.values())

    @property
    def weight_bytes(self) -> int:
        """As stored in the file."""
        return sum(t.nbytes for t in self.weights.values())


def is_checkpoint(directory: Path) -> bool:
    """Does the directory look like one? A graph beside it is then not what runs, unless it is named."""
    return find_file(directory, "config.json") is not None and any(directory.glob("*.safetensors"))


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a model directory.

    Raises UnsupportedModelError for an architecture or a config value that is not implemented, and
    ModelError for everything that is missing, damaged or contradictory, naming the file.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(
            f"Model directory not found: {directory}",
            hint=f"expected a directory with {EXPECTED}; `nanovllm pull REPO --output {directory}` downloads one",
        )
    config_path = find_file(directory, "config.json")
    if config_path is None:
        if find_file(directory, model_info.FILE_NAME):
            raise UnsupportedModelError(
                f"{directory} has {model_info.FILE_NAME} but no config.json, and that does not say the architecture",
                hint=f"expected {EXPECTED}",
            )
        raise ModelError(f"no config.json in the model directory {directory}", hint=f"expected {EXPECTED}")
    values = read_json(config_path)
    config = Config(values, str(config_path))
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{config_path}: model_type does not name an architecture", hint="restore the file")
    if config.get("quantization_config"):
        raise config.unsupported("quantization_config", values["quantization_config"], "use the unquantised checkpoint")
    family = find_family(model_type)
    spec = family.spec(config)
    config.finish()

    info = ModelInfo.read(directory)
    for key, wanted in (
        ("vocab_size", spec.vocab_size),
        ("hidden_size", spec.hidden_size),
        ("num_layers", spec.num_layers),
        ("num_heads", spec.attention.num_heads),
    ):
        if getattr(info, key) != wanted:
            raise ModelError(
                f"{directory / model_info.FILE_NAME}: {key} is {getattr(info, key)} but config.json says {wanted}",
                hint=f"correct or delete {model_info.FILE_NAME}",
            )
    generation_path = find_file(directory, generation.FILE_NAME)
    sources = [(generation_path, read_json(generation_path))] if generation_path else []
    sources.append((config_path, values))
    ids_of_info = {"eos_token_id": info.eos_token_id, "bos_token_id": info.bos_token_id}
    id_sources = [*sources, (directory / model_info.FILE_NAME, ids_of_info)]
    weights = canonical_weights(directory, family, spec, _open_all(directory))
    [(dtype, _)] = Counter(t.dtype for t in weights.values()).most_common(1)
    return Checkpoint(
        path=directory,
        spec=spec,
        weights=weights,
        info=info,
        eos_ids=special_ids(id_sources, "eos_token_id"),
        bos_id=next(iter(special_ids(id_sources, "bos_token_id")), None),
        sampling_defaults=sampling_defaults(sources),
        dtype=_DTYPE_NAMES[dtype],
    )


def _open_all(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the directory's safetensors, by its name in the file."""
    if path := find_file(directory, SINGLE):
        return open_weights(path)
    index_path = find_file(directory, INDEX)
    if index_path is None:
        if program := find_program(directory):
            raise UnsupportedModelError(
                f"{directory} has no safetensors, only {program.name}, which torch wrote",
                hint="use runner: torch, from nanovllm[torch]: it runs programs and says how to convert weights",
            )
        pickled = sorted(p.name for p in directory.glob("*") if p.suffix in PICKLED)
        if pickled:
            raise UnsupportedModelError(
                f"{directory} has only pickled weights ({', '.join(pickled[:3])}), and nothing is ever unpickled here",
                hint=conversion_hint(directory),
            )
        raise ModelError(f"no {SINGLE} in the model directory {directory}", hint=f"expected {EXPECTED}")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(f"{index_path}: weight_map does not map tensors to files", hint="download the model again")
    shards: dict[str, dict[str, Tensor]] = {}
    for name in sorted(set(weight_map.values())):
        shard = find_file(directory, name)
        if shard is None:
            raise ModelError(f"{index_path} names {name!r:.100}, which does not exist", hint="download the model again")
        shards[name] = open_weights(shard)
    tensors: dict[str, Tensor] = {}
    for shard_name, found in shards.items():
        for name, tensor in found.items():
            if weight_map.get(name, shard_name) != shard_name:
                raise ModelError(
                    f"{directory / shard_name} holds {name!r}, which {index_path} places in {weight_map[name]!r:.100}",
                    hint="download the model again",
                )
            tensors[name] = tensor
    lacking = sorted(weight_map.keys() - tensors.keys())
    if lacking:
        raise ModelError(f"{index_path} names {some(lacking)}, which the shards lack", hint="download the model again")
    return tensors
