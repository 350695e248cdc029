"""`load_checkpoint`: a Hugging Face model directory -> the spec, its weights and its facts.

One loader for all families; what differs between them is data (`families/`). Reads config.json,
generation_config.json, model_info.json and safetensors files, sharded or not. Nothing is unpickled
or imported from the directory, and no tensor's data is read: weights are views into memory maps.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm.errors import ModelError, UnsupportedModelError

from . import model_info
from .config import Config
from .files import find_file, read_json
from .model_info import ModelInfo
from .registry import Family, find_family
from .spec import DecoderSpec
from .weights_file import FLOATS, Tensor, open_weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPECTED = f"config.json and {SINGLE} (or {INDEX} and its shards)"
_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    path: Path
    spec: DecoderSpec
    weights: Mapping[str, Tensor]  # canonical name -> view; exactly the names of spec.shapes()
    info: ModelInfo
    eos_ids: tuple[int, ...]  # generation_config.json, else config.json, else model_info.json
    bos_id: int | None
    dtype: str  # the weights' (most frequent) type in the file: float32, bfloat16, ...

    @property
    def name(self) -> str:
        return self.info.model_name

    @property
    def num_parameters(self) -> int:
        """Counted in the file; `spec.num_parameters` is the same by formula."""
        return sum(t.array.size for t in self.weights.values())

    @property
    def weight_bytes(self) -> int:
        """As stored in the file."""
        return sum(t.nbytes for t in self.weights.values())


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a model directory.

    Raises UnsupportedModelError for an architecture or a config value that is not implemented, and
    ModelError for everything that is missing, damaged or contradictory, naming the file.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelError(f"Model directory not found: {directory}", hint=f"expected a directory with {EXPECTED}")
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
    eos_ids, bos_id = _special_ids(directory, values, info)
    weights = _canonical(directory, family, spec, _open_all(directory))
    [(dtype, _)] = Counter(t.dtype for t in weights.values()).most_common(1)
    return Checkpoint(
        path=directory,
        spec=spec,
        weights=weights,
        info=info,
        eos_ids=eos_ids,
        bos_id=bos_id,
        dtype=_DTYPE_NAMES[dtype],
    )


def _special_ids(directory: Path, config: Mapping[str, Any], info: ModelInfo) -> tuple[tuple[int, ...], int | None]:
    """eos ids and the bos id: the first file that names any wins."""
    path = find_file(directory, "generation_config.json")
    sources = [(path, read_json(path))] if path else []
    sources.append((directory / "config.json", dict(config)))
    sources.append(
        (directory / model_info.FILE_NAME, {"eos_token_id": info.eos_token_id, "bos_token_id": info.bos_token_id})
    )

    def first(key: str) -> tuple[int, ...]:
        for path, values in sources:
            value = values.get(key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ModelError(f"{path}: {key} is {value!r:.60}, not a token id or a list of them", hint="correct it")
            if ids:
                return tuple(dict.fromkeys(ids))
        return ()

    return first("eos_token_id"), next(iter(first("bos_token_id")), None)


def _open_all(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the directory's safetensors, by its name in the file."""
    if path := find_file(directory, SINGLE):
        return open_weights(path)
    index_path = find_file(directory, INDEX)
    if index_path is None:
        pickled = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickled:
            raise UnsupportedModelError(
                f"{directory} has only pickled weights ({', '.join(pickled[:3])}), and nothing is ever unpickled",
                hint="convert them to safetensors, or download the checkpoint's safetensors revision",
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
        raise ModelError(f"{index_path} names {_some(lacking)}, which the shards lack", hint="download the model again")
    return tensors


def _canonical(directory: Path, family: Family, spec: DecoderSpec, files: dict[str, Tensor]) -> dict[str, Tensor]:
    """Canonical name -> tensor: prefixes, splits, transposes and ties as the family declares them.

    Raises ModelError naming the tensors that are missing, unexpected or of the wrong shape or type.
    """
    shapes, prefix = spec.shapes(), family.PREFIX
    bare = not any(name.startswith(prefix) for name in files)  # saved from the base model, without its prefix
    expected: dict[str, tuple[str, ...]] = {}  # file name -> canonical names
    transposed: set[str] = set()
    for template, modules in family.LAYOUT.items():
        for i in range(spec.num_layers if "{i}" in template else 1):
            stem = template.replace("{i}", str(i))
            parts = [m.replace("{i}", str(i)) for m in ((modules,) if isinstance(modules, str) else modules)]
            for kind in ("weight", "bias"):
                if f"{parts[0]}.{kind}" in shapes:
                    file_name = f"{stem.removeprefix(prefix) if bare else stem}.{kind}"
                    expected[file_name] = tuple(f"{part}.{kind}" for part in parts)
                    if kind == "weight" and template in family.TRANSPOSED:
                        transposed.add(file_name)

    if spec.tied_embeddings:
        files = _tie(directory, files, next(f for f, names in expected.items() if names == ("embed.tokens.weight",)))
    missing = sorted(expected.keys() - files.keys())
    unexpected = sorted(
        name for name in files.keys() - expected.keys() if not re.fullmatch(family.IGNORED, name.removeprefix(prefix))
    )
    if missing or unexpected:
        parts = ([f"lack {_some(missing)}"] if missing else []) + (
            [f"hold {_some(unexpected)}, which this architecture does not have"] if unexpected else []
        )
        raise ModelError(
            f"the weights in {directory} do not fit a {spec.architecture} model: they {' and '.join(parts)}",
            hint="check that config.json belongs to these weights",
        )

    weights: dict[str, Tensor] = {}
    for file_name, names in expected.items():
        tensor = files[file_name].T if file_name in transposed else files[file_name]
        rows = [shapes[name][0] for name in names]
        whole = (sum(rows), *shapes[names[0]][1:])
        if tensor.shape != whole:
            stored = whole[::-1] if file_name in transposed else whole
            raise ModelError(
                f"the weights in {directory}: {file_name} has shape {list(files[file_name].shape)} where config.json "
                f"asks for {list(stored)}",
                hint="check that config.json belongs to these weights",
            )
        if tensor.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"the weights in {directory}: {file_name} is stored as {tensor.dtype}",
                hint=f"use an unquantised checkpoint ({', '.join(FLOATS)})",
            )
        start = 0
        for name, size in zip(names, rows, strict=True):
            weights[name] = tensor.rows(start, start + size)
            start += size
    return {name: weights[name] for name in shapes}


def _tie(directory: Path, files: dict[str, Tensor], embedding: str) -> dict[str, Tensor]:
    """One embedding out of either name or both; refused if both are there and differ."""
    files = dict(files)
    head = files.pop("lm_head.weight", None)
    if head is None:
        return files
    other = files.setdefault(embedding, head)
    if other.dtype != head.dtype or not np.array_equal(other.array, head.array):
        raise ModelError(
            f"config.json of {directory} ties the embeddings, but {embedding} and lm_head.weight differ",
            hint='set "tie_word_embeddings": false in config.json if the weights are right',
        )
    return files


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
