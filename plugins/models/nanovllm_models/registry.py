"""Families by model_type, found through the entry-point group `nanovllm.models`.

Only the one that a checkpoint names is imported. Knows no family by name.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Protocol, cast

from nanovllm.errors import PluginError, UnsupportedModelError

from .config import Config
from .families.refused import REFUSED
from .spec import DecoderSpec

GROUP = "nanovllm.models"


class Family(Protocol):
    """What a family's module holds; `families/__init__.py` explains each."""

    PREFIX: str
    LAYOUT: dict[str, str | tuple[str, ...]]
    TRANSPOSED: frozenset[str]
    GROUPED: frozenset[str]
    IGNORED: str

    def spec(self, config: Config) -> DecoderSpec: ...


def known_architectures() -> list[str]:
    return sorted(entry_points(group=GROUP).names)


def refused_architectures() -> dict[str, str]:
    """model_type -> why it is not implemented, for those that people bring and that no family provides."""
    return {name: reason for name, reason in REFUSED.items() if name not in known_architectures()}


def find_family(model_type: str) -> Family:
    """Import the family of a model_type.

    Raises UnsupportedModelError if there is none, PluginError if two distributions provide it or it
    cannot be imported.
    """
    found = {(e.value, e.dist.name if e.dist else "?"): e for e in entry_points(group=GROUP, name=model_type)}
    if not found and model_type in REFUSED:
        raise UnsupportedModelError(
            f"the architecture {model_type!r} is not implemented: {REFUSED[model_type]}",
            hint="use another model, or install a package that provides it in the entry-point group nanovllm.models",
        )
    if not found:
        raise UnsupportedModelError(
            f"the architecture {model_type!r:.60} is not implemented (known: {', '.join(known_architectures())})",
            hint="use another model, or install a package that provides it in the entry-point group nanovllm.models",
        )
    if len(found) > 1:
        owners = ", ".join(sorted(dist for _, dist in found))
        raise PluginError(
            f"the architecture {model_type!r} is provided by more than one distribution: {owners}",
            hint="uninstall all but one",
        )
    [((value, dist), entry)] = found.items()
    try:
        return cast("Family", entry.load())
    except Exception as e:  # a third party's code: whatever it raises is the cause to show
        raise PluginError(
            f"the family {model_type!r} ({value}) of {dist} cannot be imported: {e!r}", hint=f"pip install -U {dist}"
        ) from e
