"""What `runner: {type: http, ...}` and `tokenizer: {type: http, ...}` may say.

Addresses, keys and certificates come from here and from nowhere else. This file opens nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_SERVERS = 64
_NO_ADDRESS = "must be an address, http://host:port or https://host"


def _base_url(url: str) -> str:
    """`http://host:port/prefix` without a slash at the end; credentials and queries do not belong in an address."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number
    except ValueError:
        raise ValueError(_NO_ADDRESS) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(_NO_ADDRESS)
    if parts.username is not None or parts.password is not None:
        raise ValueError("must have no user name and no password; a key comes from api_key_env or api_key_file")
    if parts.query or parts.fragment or any(c.isspace() or not c.isprintable() for c in url):
        raise ValueError("must have no query, no fragment and no space")
    return url.rstrip("/")


def _variable(name: str) -> str:
    """A variable's name; the message does not show it, because the key itself is easily written here."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise PydanticCustomError("secret", "must be the name of an environment variable, which holds the key")
    return name


def _path(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str) and value else value


Url = Annotated[str, AfterValidator(_base_url)]
Variable = Annotated[str, AfterValidator(_variable)]
FilePath = Annotated[Path, BeforeValidator(_path)]
Seconds = Annotated[float, Field(gt=0, le=86400)]
_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)


class Timeouts(BaseModel):
    """All in seconds. A streamed answer is watched by the runner, an unstreamed one by the transport."""

    model_config = _STRICT

    connect: Seconds = Field(default=5.0, description="to open a connection")
    read: Seconds = Field(
        default=60.0, description="for an unstreamed answer, and between two pieces of a streamed one"
    )
    queue: Seconds = Field(default=300.0, description="from sending a prompt to its first token, retries included")
    total: Seconds | None = Field(default=None, description="from sending a prompt to the end of its answer")


class ConnectionOptions(BaseModel):
    """How to reach a server; the same for the runner and the tokenizer."""

    model_config = _STRICT

    timeouts: Timeouts = Field(default=Timeouts(), description="in seconds")
    retries: int = Field(default=2, ge=0, le=10, description="attempts after the first, each before any token came")
    api_key_env: Variable | None = Field(default=None, description="the environment variable with the bearer token")
    api_key_file: FilePath | None = Field(default=None, description="the file with the bearer token")
    verify: bool = Field(default=True, description="check the certificates of https servers")
    ca_file: FilePath | None = Field(default=None, description="trust these authorities (PEM) and no others")
    proxy: Url | None = Field(default=None, description="go through this proxy; without, none is used")

    @model_validator(mode="after")
    def _one_of_each(self) -> ConnectionOptions:
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("api_key_env and api_key_file are both given; choose one")
        if self.ca_file is not None and not self.verify:
            raise ValueError("ca_file says whom to trust and verify: false trusts everybody; choose one")
        return self


class HttpOptions(ConnectionOptions):
    url: Url | None = Field(default=None, description="the server, as http://host:port or https://host/prefix")
    servers: tuple[Url, ...] = Field(
        default=(), strict=False, max_length=MAX_SERVERS, description="several servers of one model, instead of url"
    )
    dialect: Literal["auto", "nanovllm", "llamacpp", "openai"] = Field(
        default="auto", description="what the server speaks; auto asks it"
    )
    mode: Literal["auto", "step", "completion"] = Field(
        default="auto",
        description="step: a call for each token of the whole batch (dialect nanovllm); completion: a stream for each "
        "answer; auto: step where the dialect is nanovllm",
    )
    model: str | None = Field(
        default=None, min_length=1, max_length=256, description="the name sent to the server; none: the only one it has"
    )
    extra: dict[str, Any] = Field(
        default_factory=dict, description="more fields for every request, of those that the dialect lets through"
    )
    llamafile: FilePath | None = Field(default=None, description="start this llamafile instead of naming a server")
    command: tuple[str, ...] = Field(
        default=(), strict=False, description="start this llama-server instead of naming a server"
    )
    args: tuple[str, ...] = Field(default=(), strict=False, description="arguments after llamafile or command")
    restarts: int = Field(default=3, ge=0, le=100, description="how often a started server may die")
    startup_timeout: Seconds = Field(default=300.0, description="seconds for a started server to load its model")

    @model_validator(mode="after")
    def _one_source(self) -> HttpOptions:
        given = [name for name in ("url", "servers", "llamafile", "command") if getattr(self, name)]
        if len(given) != 1:
            said = "none is given" if not given else f"{' and '.join(given)} are given"
            raise ValueError(f"one of url, servers, llamafile and command says where the model is; {said}")
        if len(set(self.servers)) != len(self.servers):
            raise ValueError("servers names an address twice")
        if self.args and not self.is_managed:
            raise ValueError("args belong to llamafile or command")
        if self.mode == "step" and self.dialect not in ("auto", "nanovllm"):
            raise ValueError(f"mode step needs dialect nanovllm, not {self.dialect}")
        return self

    @property
    def is_managed(self) -> bool:
        """Do we start the server ourselves?"""
        return self.llamafile is not None or bool(self.command)

    @property
    def addresses(self) -> tuple[str, ...]:
        """The configured servers; empty where we start one."""
        return self.servers or ((self.url,) if self.url is not None else ())


class TokenizerOptions(ConnectionOptions):
    url: Url = Field(description="the server, as http://host:port or https://host/prefix")
    dialect: Literal["auto", "nanovllm", "llamacpp"] = Field(default="auto", description="what it speaks; auto asks it")
    vocab_size: int | None = Field(default=None, ge=1, le=1 << 20, description="entries, where the server does not say")
