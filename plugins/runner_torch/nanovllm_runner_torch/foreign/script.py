"""`open_script`: the decoder of a TorchScript archive, from its schema and from trying it with a few tokens.

A schema has names and types and no shapes. The type of a mask is tried; so is the shape of a past: where the model runs
without one, what it gives back shows the shape, else numbers from config.json or model_info.json are tried. What the
model does with all of it is for the probe to find out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from nanovllm.errors import ModelError, RunnerError, UnsupportedModelError
from nanovllm_models import Config, model_info
from nanovllm_models.files import find_file, read_json
from nanovllm_models.lanes import NUMBER_TYPES, Past, Square, square

from .decoder import TorchDecoder, name_of
from .signature import UNDERSTOOD, Input, Role, Signature, role_of

MASK_TYPES = (torch.int64, torch.bool)
# In config.json or model_info.json: what each may be called.
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
HIDDEN_SIZE = ("hidden_size", "n_embd")
HEAD_SIZE = ("head_dim",)
MAX_NUMBER = 2**16  # of any of these, far more than any model has


class Argument(NamedTuple):
    name: str
    role: Role
    type: Any  # torch's; of one that may be None, what else it may be
    may_be_absent: bool


def open_script(
    module: torch.jit.ScriptModule, path: Path, directory: Path, device: torch.device, dtype: torch.dtype
) -> TorchDecoder:
    """Raises UnsupportedModelError for a `forward` that is no decoder of the kinds in `UNDERSTOOD`, ModelError where
    neither the model nor the files in the directory show the shape of the past.
    """
    script = Script(module, path, device, dtype)
    if not script.has_past:
        return script.first_that_runs([(0, None)])
    asked = script.ask_without_past()
    if asked is not None:
        return script.first_that_runs([asked])
    return script.first_that_runs(list(_shapes_in(directory, script)))


class Script:
    """A module and what its schema says."""

    def __init__(self, module: torch.jit.ScriptModule, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.module, self.path, self.device, self.dtype = module, path, device, dtype
        schema: Any = module.forward.schema  # type: ignore[attr-defined]  # a method of torch's
        given = schema.arguments[1:]  # without self
        self.shown = f"forward({', '.join(f'{a.name}: {a.type}' for a in given)})"
        self.arguments: list[Argument] = []
        for a in given:
            is_optional = a.type.kind() == "OptionalType"
            inner = a.type.getElementType() if is_optional else a.type
            role = role_of(a.name, is_first=not self.arguments)
            taken = {known.role for known in self.arguments} - {"past", "constant"}
            if role is not None and role not in taken and (role == "past" or inner.kind() == "TensorType"):
                self.arguments.append(Argument(a.name, role, inner, is_optional))
            elif is_optional:
                self.arguments.append(Argument(a.name, "constant", inner, True))
            elif not a.has_default_value():
                raise UnsupportedModelError(
                    f"{path} is {self.shown}, of which nobody here knows {a.name!r}", hint=UNDERSTOOD
                )
        if not self.arguments or self.arguments[0].role != "ids":
            raise UnsupportedModelError(f"{path} is {self.shown}, which takes no token ids first", hint=UNDERSTOOD)
        self.past_types = [a.type for a in self.arguments if a.role == "past"]
        self.has_past = bool(self.past_types)
        self.says_num_layers = not any(_has_list(t) for t in self.past_types)
        self.mask_types = MASK_TYPES if any(a.role == "mask" for a in self.arguments) else MASK_TYPES[:1]

    def ask_without_past(self) -> tuple[int, Past] | None:
        """Layers, and the shape that all tensors of the past have: of what the model gives back when it gets none."""
        if not all(a.may_be_absent or a.type.kind() == "ListType" for a in self.arguments if a.role == "past"):
            return None
        found: list[list[torch.Tensor]] = []
        for mask_type in self.mask_types:
            decoder = self._decoder(mask_type, 0, None)
            try:
                found = [decoder.answer(tokens, tokens.real, ())[1] for tokens in _texts()]
            except RunnerError:
                continue
            break
        if not found or not found[0] or len({(t.shape, t.dtype) for t in found[0]}) > 1 or found[0][0].ndim != 4:
            return None
        short, long = found[0][0], found[1][0]
        varying = [i for i in range(1, 4) if short.shape[i] != long.shape[i]]
        if len(varying) != 1 or name_of(short.dtype) not in NUMBER_TYPES:
            return None
        sizes = tuple(1 if i in (0, varying[0]) else size for i, size in enumerate(short.shape))
        return len(found[0]) // 2, Past("", "", name_of(short.dtype), sizes, 0, varying[0])

    def first_that_runs(self, shapes: Sequence[tuple[int, Past | None]]) -> TorchDecoder:
        """`shapes`: layers, and the shape of their past. UnsupportedModelError if the model takes none."""
        reason = ""
        for mask_type, (num_layers, past) in itertools.product(self.mask_types, shapes):
            decoder = self._decoder(mask_type, num_layers, past)
            try:
                for tokens in _texts():
                    decoder.run(tokens, tokens.real, decoder.pack(1, 0, 0.0, ()))
            except RunnerError as e:
                reason = reason or e.message
            else:
                return decoder
        tried = ", ".join(str(past.shape(1, 0)) for _, past in shapes if past is not None)
        raise UnsupportedModelError(
            f"{self.path} is {self.shown}, and cannot be run with token ids of shape [1, 2]"
            f"{tried and f' and pasts of shape {tried}'}: {reason}",
            hint=UNDERSTOOD,
        )

    def _decoder(self, mask_type: torch.dtype, num_layers: int, past: Past | None) -> TorchDecoder:
        """`past`: the shape of all of them; None = the model is called without any."""
        call: dict[str, Any] = {}
        for a in self.arguments:
            if a.role == "constant" or (a.role == "past" and past is None and a.may_be_absent):
                call[a.name] = None
            elif a.role == "past":
                call[a.name] = _names(a.name, a.type, num_layers)
            else:
                call[a.name] = a.name
        names, spec = tree_flatten(((), call))
        roles: dict[str, Role] = {a.name: a.role for a in self.arguments if a.role != "past"}
        types: dict[Role, torch.dtype] = {"ids": torch.int64, "mask": mask_type, "positions": torch.int64}
        inputs: list[Input] = []
        pasts: list[Past] = []
        for name in names:
            role: Role = "constant" if name is None else roles.get(name, "past")
            inputs.append(Input(str(name), role, types.get(role)))
            if role == "past" and past is not None:
                pasts.append(replace(past, past=name, present=f"present of {name}"))
        return TorchDecoder(self.module, Signature(tuple(inputs), spec, tuple(pasts)), self.device, self.dtype)


def _texts() -> Iterator[Square]:
    """Two of different lengths: what is as long in both runs is no number of tokens."""
    for length in (2, 3):
        yield square([np.zeros(length, np.int32)], [0], "right")


def _has_list(kind: Any) -> bool:
    return kind.kind() == "ListType" or (kind.kind() == "TupleType" and any(map(_has_list, kind.elements())))


def _names(name: str, kind: Any, num_layers: int) -> Any:
    """A name for each tensor of an argument, nested as the schema says; a list has one element for each layer, or two
    if they are tensors."""
    if kind.kind() == "TupleType":
        return tuple(_names(f"{name}[{i}]", element, num_layers) for i, element in enumerate(kind.elements()))
    if kind.kind() == "ListType":
        element = kind.getElementType()
        count = num_layers * (2 if element.kind() == "TensorType" else 1)
        return [_names(f"{name}[{i}]", element, num_layers) for i in range(count)]
    return name


def _shapes_in(directory: Path, script: Script) -> Iterator[tuple[int, Past]]:
    """Those that config.json and model_info.json allow: of the past (B, heads, T, size), or else (B, T, heads, size).

    Raises ModelError naming what no file says.
    """
    facts: dict[str, Any] = {}
    for name in (model_info.FILE_NAME, "config.json"):
        if found := find_file(directory, name):
            facts |= {key: value for key, value in read_json(found).items() if value is not None}
    config = Config(facts, f"config.json or {model_info.FILE_NAME} in {directory}")

    def number(names: Sequence[str]) -> int | None:
        return next((config.integer(name, high=MAX_NUMBER) for name in names if name in config), None)

    heads, kv_heads, size, hidden = (number(names) for names in (HEADS, KV_HEADS, HEAD_SIZE, HIDDEN_SIZE))
    num_layers = 0 if script.says_num_layers else number(LAYERS)
    if size is None and hidden is not None and heads is not None:
        size = hidden // heads
    missing = []
    if num_layers is None:
        missing.append("how many layers it has (num_hidden_layers)")
    if kv_heads is None and heads is None:
        missing.append("how many heads (num_key_value_heads, or num_attention_heads)")
    if size is None:
        missing.append("of which size (head_dim, or hidden_size and num_attention_heads)")
    if num_layers is None or size is None or missing:
        raise ModelError(
            f"{script.path} does not show the shape of its past, and no file beside it says {', '.join(missing)}",
            hint=f"put config.json or {model_info.FILE_NAME} with these numbers into {directory}",
        )
    # model_info.json has no number of kv heads: it divides the number of heads.
    counts = [kv_heads or 0, *(n for n in range(heads or 0, 0, -1) if (heads or 0) % n == 0)]
    for count in dict.fromkeys(n for n in counts if n):
        for sizes, time_axis in (((1, count, 1, size), 2), ((1, 1, count, size), 1)):
            yield num_layers, Past("", "", name_of(script.dtype), sizes, 0, time_axis)
