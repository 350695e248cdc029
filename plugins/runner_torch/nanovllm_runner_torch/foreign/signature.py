"""`Signature`: what the arguments of somebody's model mean, and how tensors are put together to call it.

A model is a function of tensors in any nesting of tuples, lists and dicts: the leaves of its arguments are numbered,
and each has a role. Knows neither TorchScript nor torch.export.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.utils._pytree import TreeSpec

from nanovllm.errors import UnsupportedModelError
from nanovllm_models.lanes import REFUSED_INPUTS, Past

Role = Literal["ids", "mask", "positions", "past", "constant"]
NAMES: dict[Role, str] = {  # of arguments behind the first, which is the token ids
    "mask": r"(attention_)?mask",
    "positions": r"position(_id)?s",
    "past": r"(past|kv|cache_?[kv]|[kv]_?cache|(key|value)s?\b).*",
}
UNDERSTOOD = (
    "understood is forward(input_ids[, attention_mask][, position_ids][, past_key_values]) -> logits[, presents] for "
    "any number of tokens: token ids of (batch, tokens), the past as arguments past_0_key, past_0_value, ... or as one "
    "list or tuple of (key, value) pairs, and the presents in the same order"
)


class Input(NamedTuple):
    """A leaf of the arguments."""

    name: str
    role: Role
    dtype: torch.dtype | None = None  # None of a constant
    value: object = None  # of a constant


@dataclass(frozen=True, slots=True)
class Signature:
    inputs: tuple[Input, ...]  # the leaves, in order
    arguments: TreeSpec  # how they become (args, kwargs)
    past: tuple[Past, ...]  # those whose role is past, in order

    def has(self, role: Role) -> bool:
        return any(value.role == role for value in self.inputs)


def role_of(name: str, is_first: bool) -> Role | None:
    """None: nobody here knows it. Raises UnsupportedModelError for one that says that the model is another kind."""
    for part, what in REFUSED_INPUTS.items():
        if part in name:
            raise UnsupportedModelError(f"the model {what}: it has an input {name!r}", hint=UNDERSTOOD)
    if is_first:
        return "ids"
    return next((role for role, pattern in NAMES.items() if re.fullmatch(pattern, name)), None)
