"""The errors that nanovllm raises on purpose.

    NanoVLLMError                  exit 1
    ├── ConfigError                exit 2
    ├── RequestError               exit 2
    │   └── PromptTooLong
    ├── PluginError                exit 3
    ├── ModelError                 exit 4
    │   └── UnsupportedModelError
    ├── TokenizerError             exit 4
    ├── RunnerError                exit 5
    │   └── RunnerDead
    ├── RequestFailed              exit 5: an accepted request ended in an error
    ├── EngineDead                 exit 5
    └── EngineClosed               exit 5

This file knows nothing about who raises what.
"""

from __future__ import annotations

from typing import Any


def without_secrets(text: str) -> str:
    """For what shows a value: `http://user:password@host/?key=1` becomes `http://***@host/?***`."""
    scheme, mark, rest = text.partition("://")
    if not mark:
        return text
    _, at, address = rest.rpartition("@")
    address, query, _ = address.partition("?")
    return f"{scheme}://{'***@' if at else ''}{address}{'?***' if query else ''}"


class NanoVLLMError(Exception):
    """Base of all that nanovllm raises on purpose.

    `str(error)` is one sentence: `message` names the thing and the cause, `hint` is the next command or edit, or None.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ConfigError(NanoVLLMError):
    """A value of the configuration that cannot be used: which one, where it came from, and what is allowed."""

    exit_code = 2


class RequestError(NanoVLLMError, ValueError):
    """A request refused at the door, with the numbers. Also a ValueError: nothing has run and no state has changed."""

    exit_code = 2


class PromptTooLong(RequestError):
    """The prompt leaves no room for an answer, in the model or in the KV pool."""


class PluginError(NanoVLLMError):
    """A plugin that is missing, clashes with another, is broken, or is made for another core."""

    exit_code = 3


class ModelError(NanoVLLMError):
    """A model directory that cannot be used: the file, what is wrong with it, and the remedy."""

    exit_code = 4


class UnsupportedModelError(ModelError):
    """An architecture, or a value of a `config.json` that would change the computation, that is not implemented."""


class TokenizerError(NanoVLLMError):
    """A tokenizer that cannot be loaded, or cannot do what is asked of it."""

    exit_code = 4


class RunnerError(NanoVLLMError):
    """A runner failed a step: the requests of that step fail, and the engine goes on."""

    exit_code = 5


class RunnerDead(RunnerError):
    """A runner that no later step can succeed with: every live request fails, and the engine takes no more."""


class RequestFailed(NanoVLLMError):
    """At least one accepted request ended in an error.

    `outputs` holds every output of the call, in prompt order: the good ones too, so nothing is lost.
    """

    exit_code = 5

    def __init__(self, message: str, *, outputs: list[Any] | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.outputs = outputs or []


class EngineDead(NanoVLLMError):
    """The engine has failed for good and takes no more requests; the message says why."""

    exit_code = 5


class EngineClosed(NanoVLLMError):
    """Used after `close()`, or ended by it."""

    exit_code = 5
