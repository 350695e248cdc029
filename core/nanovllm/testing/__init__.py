"""What the project tests itself with, shipped so that plugin authors can do the same.

    from nanovllm.testing import RunnerConformance

    class TestAcme(RunnerConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def config(cls):
            return {"model": "demo", "runner": "acme"}

The names below load when they are first used. The suites need `pip install 'nanovllm[testing]'`;
docs/conformance.md says what each of their levels proves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = [
    "ChainRunner",
    "FamilyConformance",
    "RunnerConformance",
    "SamplerConformance",
    "TokenizerConformance",
    "alone",
]

if TYPE_CHECKING:
    from .chain import ChainRunner, alone
    from .runner import RunnerConformance
    from .sampler import SamplerConformance
    from .tokenizer import TokenizerConformance

    FamilyConformance: Any  # nanovllm-models brings it, and the core imports no plugin

# Suite -> the group of plugins that it examines; what provides it is an entry point of `nanovllm.conformance`.
_SUITES = {
    "FamilyConformance": "models",
    "RunnerConformance": "runners",
    "SamplerConformance": "samplers",
    "TokenizerConformance": "tokenizers",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'nanovllm.testing' has no attribute {name!r}")
    if name not in _SUITES:
        from . import chain

        value = getattr(chain, name)
    else:
        value = suite_for(_SUITES[name])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def suite_for(group: str) -> Any:
    """The conformance suite for a group of plugins, such as "runners". Raises PluginError."""
    from ..errors import PluginError
    from ..loader import load_object
    from ..plugins import find

    try:
        return load_object(find("conformance", group))
    except PluginError as e:
        if isinstance(missing := e.__cause__, ModuleNotFoundError) and missing.name in ("hypothesis", "pytest"):
            raise PluginError(
                f"the conformance suites need {missing.name}, which is not installed",
                hint="try: pip install 'nanovllm[testing]'",
            ) from None
        raise
