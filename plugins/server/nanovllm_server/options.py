"""The `server:` section of the configuration: caps, times, limits and names. Read-only; knows no route."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

if TYPE_CHECKING:
    from nanovllm.config import Loaded


def _path(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str) and value else value


def _names(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


File = Annotated[Path, BeforeValidator(_path)]
Name = Annotated[str, StringConstraints(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_names)]
Origin = Annotated[str, StringConstraints(pattern=r"^https?://[^/*\s]+$")]
Origins = Annotated[tuple[Origin, ...], BeforeValidator(_names)]


class ServerOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    # Where, and who is let in.
    host: str = Field(default="127.0.0.1", min_length=1, description="address to serve at")
    port: int = Field(default=8000, ge=0, le=65535, description="0 = any free one")
    api_key_file: File | None = Field(default=None, description="file with the API keys, one a line")
    tls_certificate: File | None = Field(default=None, description="PEM file with the certificate and its chain")
    tls_key: File | None = Field(default=None, description="PEM file with its private key; null = in the same file")
    allowed_hosts: Names = Field(
        default=(), description="names in the Host header that are served without API keys, besides this machine's own"
    )
    cors_origins: Origins = Field(default=(), description="origins whose web pages may call, such as https://a.example")
    model_name: str | None = Field(default=None, min_length=1, description="what the API calls the model")
    hide_model_dir: bool = Field(default=False, description="does /healthz keep to itself where the model lies?")
    log_format: Literal["json", "text"] = Field(default="json", description="of the log, one line per record")
    log_prompts: bool = Field(default=False, description="also log what is asked, word for word")

    # What one call may bring.
    max_header_bytes: int = Field(default=16 << 10, ge=256, le=64 << 10, description="of a request's line and headers")
    max_body_bytes: int = Field(default=8 << 20, ge=1, description="bytes of a request's body")
    head_seconds: float = Field(default=10.0, gt=0, description="for a request's line and headers to arrive")
    body_seconds: float = Field(default=30.0, gt=0, description="for a body to arrive")
    max_prompts: int = Field(default=128, ge=1, description="prompts in one call")
    max_choices: int = Field(default=256, ge=1, description="prompts times n of one call")
    max_prompt_tokens: int | None = Field(default=None, ge=1, description="of one prompt; null = the model's length")
    max_tokens: int | None = Field(default=None, ge=1, description="of one answer; null = the model's length")
    max_text_chars: int = Field(default=1 << 20, ge=1, description="to tokenize for one call")
    max_ids: int = Field(default=1 << 18, ge=1, description="to detokenize")
    allow_priority: bool = Field(default=False, description="may a request run ahead of others (priority below 0)?")

    # What all calls together may.
    max_connections: int = Field(
        default=512, ge=1, description="at once; beyond it an idle one is closed, else the new one"
    )
    max_streams: int = Field(default=256, ge=1, description="answers that are streamed at once")
    max_queue: int = Field(default=256, ge=0, description="answers that wait while scheduler.max_num_seqs others run")
    max_queue_seconds: float = Field(
        default=60.0, gt=0, description="that an answer may be expected to wait; beyond it a call is refused at once"
    )
    requests_per_minute: float | None = Field(default=None, gt=0, description="of each API key; null = no limit")
    tokens_per_minute: float | None = Field(
        default=None, gt=0, description="of each API key, prompts and answers; charged when a call is over"
    )

    answers_at_once: float | None = Field(
        default=None,
        ge=1,
        description="of each API key that run or wait, so that no key fills the queue; null = no limit",
    )

    # Times.
    keep_alive_seconds: float = Field(default=15.0, gt=0, description="of silence, before a stream gets a comment")
    reader_seconds: float = Field(
        default=60.0, gt=0, description="that a stream's reader may take nothing before it is cut off"
    )
    idle_seconds: int = Field(default=75, ge=1, description="that a connection is kept without a request")
    drain_seconds: float = Field(
        default=30.0, ge=0, description="after SIGTERM, for what runs to end by itself before it is aborted"
    )

    @model_validator(mode="after")
    def _key_needs_certificate(self) -> ServerOptions:
        if self.tls_key is not None and self.tls_certificate is None:
            raise ValueError("tls_key needs tls_certificate")
        return self


def server_options(loaded: Loaded, flags: Mapping[str, Any]) -> ServerOptions:
    """The section of a configuration with the command's own flags on top. Raises ConfigError."""
    from nanovllm.config import config_error, unknown_key

    given = {key: value for key, value in flags.items() if value is not None}
    origins = {**loaded.origins, **{f"server.{key}": "command line" for key in given}}
    values = {**loaded.config.server, **given}
    for key in values:
        if key not in ServerOptions.model_fields:
            origin = next((o for k, o in origins.items() if f"{k}.".startswith(f"server.{key}.")), "?")
            raise unknown_key(("server", key), tuple(ServerOptions.model_fields), origin)
    try:
        return ServerOptions.model_validate(values)
    except ValidationError as e:
        raise config_error(e, origins, ("server",)) from None
