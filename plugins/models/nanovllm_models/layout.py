"""What is where in a family's files: stored tensors -> canonical weights.

Prefixes, splits, stacked experts, transposes and ties, as the family's module declares them. Knows no family and
reads no tensor's data, but for comparing two copies of a tied embedding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanovllm.errors import ModelError, UnsupportedModelError

from .registry import Family
from .spec import DecoderSpec, Experts
from .weights_file import FLOATS, Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """How the family's files hold some canonical weights: their rows lie one after another in one tensor."""

    file_name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]  # in the file
    is_transposed: bool
    groups: int  # runs of rows among which each of the weights is spread evenly; 1 = one after another as wholes


def canonical_weights(
    directory: Path, family: Family, spec: DecoderSpec, files: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Canonical name -> tensor: prefixes, splits, transposes and ties as the family declares them.

    Raises ModelError naming the tensors that are missing, unexpected or of the wrong shape or type.
    """
    prefix = family.PREFIX
    bare = not any(name.startswith(prefix) for name in files)  # saved from the base model, without its prefix
    alternatives: dict[tuple[str, ...], list[Stored]] = {}  # the same weights under more than one name
    for stored in stored_weights(family, spec, bare):
        alternatives.setdefault(stored.names, []).append(stored)
    if spec.tied_embeddings:
        [embedding] = alternatives["embed.tokens.weight",]
        head = next(f"{template}.weight" for template, modules in family.LAYOUT.items() if modules == "lm_head")
        files = _tie(directory, files, embedding.file_name, head)
    expected = [next((s for s in ways if s.file_name in files), ways[0]) for ways in alternatives.values()]

    missing = sorted(s.file_name for s in expected if s.file_name not in files)
    unexpected = sorted(
        name
        for name in files.keys() - {s.file_name for s in expected}
        if not re.fullmatch(family.IGNORED, name.removeprefix(prefix))
    )
    if missing or unexpected:
        parts = ([f"lack {some(missing)}"] if missing else []) + (
            [f"hold {some(unexpected)}, which this architecture does not have"] if unexpected else []
        )
        raise ModelError(
            f"the weights in {directory} do not fit a {spec.architecture} model: they {' and '.join(parts)}",
            hint="check that config.json belongs to these weights",
        )

    shapes, weights = spec.shapes(), {}
    for stored in expected:
        tensor = files[stored.file_name]
        if tensor.shape != stored.shape:
            raise ModelError(
                f"the weights in {directory}: {stored.file_name} has shape {list(tensor.shape)} where config.json "
                f"asks for {list(stored.shape)}",
                hint="check that config.json belongs to these weights",
            )
        if tensor.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"the weights in {directory}: {stored.file_name} is stored as {tensor.dtype}",
                hint=f"use an unquantised checkpoint ({', '.join(FLOATS)})",
            )
        tensor = tensor.T if stored.is_transposed else tensor.flat(len(shapes[stored.names[0]]))
        start = 0
        for name in stored.names:
            size = shapes[name][0]
            weights[name] = tensor.rows(start, start + size, stored.groups)
            start += size
    return {name: weights[name] for name in shapes}


def stored_weights(family: Family, spec: DecoderSpec, bare: bool = False) -> list[Stored]:
    """What a file of this family holds; `bare`: under names without the family's prefix."""
    shapes = spec.shapes()
    num_experts = max((mlp.num_experts for mlp in spec.mlps if isinstance(mlp, Experts)), default=0)
    found: list[Stored] = []
    for template, modules in family.LAYOUT.items():
        parts = (modules,) if isinstance(modules, str) else modules
        stacked = "{e}" in parts[0] and "{e}" not in template  # one tensor (experts, rows, in) for all experts
        places = [
            (i, e)
            for i in range(spec.num_layers if "{i}" in template else 1)
            for e in (range(num_experts) if "{e}" in template else [None])
        ]
        for i, e in places:
            experts = range(num_experts) if stacked else [e]
            stems = [p.replace("{i}", str(i)).replace("{e}", str(n)) for n in experts for p in parts]
            for kind in ("weight", "bias"):
                names = tuple(f"{stem}.{kind}" for stem in stems)
                if not names or names[0] not in shapes:
                    continue
                rows, rest = sum(shapes[name][0] for name in names), shapes[names[0]][1:]
                shape = (num_experts, rows // num_experts, *rest) if stacked else (rows, *rest)
                is_transposed = kind == "weight" and template in family.TRANSPOSED
                file_name = template.replace("{i}", str(i)).replace("{e}", str(e))
                found.append(
                    Stored(
                        f"{file_name.removeprefix(family.PREFIX) if bare else file_name}.{kind}",
                        names,
                        shape[::-1] if is_transposed else shape,
                        is_transposed,
                        spec.attention.num_kv_heads if template in family.GROUPED else 1,
                    )
                )
    return found


def _tie(directory: Path, files: dict[str, Tensor], embedding: str, head: str) -> dict[str, Tensor]:
    """One embedding out of either name or both; refused if both are there and differ."""
    files = dict(files)
    tensor = files.pop(head, None)
    if tensor is None:
        return files
    other = files.setdefault(embedding, tensor)
    if other.dtype != tensor.dtype or not np.array_equal(other.array, tensor.array):
        raise ModelError(
            f"config.json of {directory} ties the embeddings, but {embedding} and {head} differ",
            hint='set "tie_word_embeddings": false in config.json if the weights are right',
        )
    return files


def some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
