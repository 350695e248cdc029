"""nanovllm: one small, exact LLM engine; model runtimes are plugins.

    from nanovllm import LLM, SamplingParams

    with LLM("demo") as llm:
        print(llm.chat([{"role": "user", "content": "What is the capital of France?"}])[0].text)

The names below are the public interface; they load when first used, so that importing this package
costs nothing. Everything else may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "Completion",
    "ConfigError",
    "Delta",
    "EngineClosed",
    "EngineDead",
    "Finish",
    "ModelError",
    "NanoVLLMError",
    "Output",
    "PluginError",
    "Request",
    "RequestError",
    "RequestFailed",
    "RunnerError",
    "SamplingParams",
    "TokenizerError",
    "UnsupportedModelError",
    "__version__",
]

if TYPE_CHECKING:
    from .aio import AsyncLLM
    from .errors import (
        ConfigError,
        EngineClosed,
        EngineDead,
        ModelError,
        NanoVLLMError,
        PluginError,
        RequestError,
        RequestFailed,
        RunnerError,
        TokenizerError,
        UnsupportedModelError,
    )
    from .llm import LLM
    from .request import Completion, Delta, Finish, Output, Request, SamplingParams

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "aio",
    **dict.fromkeys(("Completion", "Delta", "Finish", "Output", "Request", "SamplingParams"), "request"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
