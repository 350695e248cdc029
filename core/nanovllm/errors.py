"""The errors that nanovllm raises on purpose.

    NanoVLLMError                  everything below; `str(e)` is one sentence, `.hint` the next command
    ├── ConfigError                a configuration value, its origin, and what is allowed       (exit 2)
    ├── RequestError               a request refused at the door, with the numbers              (exit 2)
    │   └── PromptTooLong          its prompt leaves no room for an answer
    ├── PluginError                a plugin that is missing, clashes, is broken or out of date  (exit 3)
    ├── ModelError                 a model directory that cannot be used                        (exit 4)
    │   └── UnsupportedModelError  an architecture or a value that is not implemented
    ├── TokenizerError             a tokenizer that cannot be loaded or used                    (exit 4)
    ├── RunnerError                a runner failed a step: that step's requests fail            (exit 5)
    │   └── RunnerDead             the runner cannot go on: every live request fails
    ├── RequestFailed              an accepted request ended in an error; carries all outputs   (exit 5)
    ├── EngineDead                 the engine is unhealthy and takes no more requests           (exit 5)
    └── EngineClosed               used after close()                                           (exit 5)

This file knows nothing about who raises what. `RequestError` is also a `ValueError`: it is the
caller's mistake and no state has changed when it is raised.
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
    """Base of all. `message` names the thing and the cause; `hint` is the next command or edit."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ConfigError(NanoVLLMError):
    exit_code = 2


class RequestError(NanoVLLMError, ValueError):
    exit_code = 2


class PromptTooLong(RequestError):
    pass


class PluginError(NanoVLLMError):
    exit_code = 3


class ModelError(NanoVLLMError):
    exit_code = 4


class UnsupportedModelError(ModelError):
    pass


class TokenizerError(NanoVLLMError):
    exit_code = 4


class RunnerError(NanoVLLMError):
    exit_code = 5


class RunnerDead(RunnerError):
    pass


class RequestFailed(NanoVLLMError):
    """At least one accepted request ended in an error.

    `outputs` holds every output of the call, in prompt order: the good ones too, so nothing is lost.
    """

    exit_code = 5

    def __init__(self, message: str, *, outputs: list[Any] | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.outputs = outputs or []


class EngineDead(NanoVLLMError):
    exit_code = 5


class EngineClosed(NanoVLLMError):
    exit_code = 5
