"""What a model directory says about generating: the ids that begin and end a text, sampling defaults.

The first file that names a thing wins: generation_config.json, config.json (files of old versions of
transformers), model_info.json. Sampling defaults are facts to show; nothing here or in a runner applies them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.errors import ModelError

FILE_NAME = "generation_config.json"
# Key -> the types it may have, and the least value. The same names and meanings as in SamplingParams, where those
# have the parameter; do_sample: false asks for greedy decoding.
_SAMPLING: dict[str, tuple[tuple[type, ...], float]] = {
    "do_sample": ((bool,), 0),
    "temperature": ((int, float), 0),
    "top_k": ((int,), 0),
    "top_p": ((int, float), 0),
    "min_p": ((int, float), 0),
    "repetition_penalty": ((int, float), 0),
    "max_new_tokens": ((int,), 1),
}

Source = tuple[Path, Mapping[str, Any]]  # a file and what it holds


class Default(NamedTuple):
    value: bool | int | float
    origin: str  # the file that says so


def special_ids(sources: Sequence[Source], key: str) -> tuple[int, ...]:
    """The ids under `key`, a number or a list of them. Raises ModelError naming file and key."""
    for path, values in sources:
        value = values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise ModelError(f"{path}: {key} is {value!r:.60}, not a token id or a list of them", hint="correct it")
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


def sampling_defaults(sources: Sequence[Source]) -> dict[str, Default]:
    """What the files recommend, by name. Raises ModelError naming file and key."""
    defaults: dict[str, Default] = {}
    for path, values in sources:
        for key, (types, least) in _SAMPLING.items():
            value = values.get(key)
            if value is None or key in defaults:
                continue
            if type(value) not in types or not least <= value < float("inf"):
                wanted = "true or false" if types == (bool,) else f"a number from {least} on"
                raise ModelError(f"{path}: {key} is {value!r:.60}; it must be {wanted}", hint="correct it")
            defaults[key] = Default(value, path.name)
    return defaults
