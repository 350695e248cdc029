"""The commands of this package, `nanovllm serve` and `nanovllm runner-serve`: their options and what they print."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nanovllm.cli.options import EngineCommand, engine_options

if TYPE_CHECKING:
    import socket

    from nanovllm.config import Loaded


def _environment() -> dict[str, Any]:
    from .environment import load_arguments

    return load_arguments()


@click.command(name="serve", cls=EngineCommand)
@partial(engine_options, environment=_environment)
@click.option("--host", help="Address to serve at.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="0 = any free one.  [default: 8000]")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the API keys, one a line; NANOVLLM_API_KEY may hold one, too.",
)
def serve(loaded: Loaded, **flags: Any) -> None:
    """Serve a model over HTTP, with OpenAI's API and a page to look at.

    Everything else is set in the `server:` section of the configuration. SIGTERM lets answers end, a second one ends
    the process at once. Without API keys only this machine is let in.
    """
    from . import logs
    from .app import create_app
    from .bind import bind
    from .keys import load_keys
    from .lifecycle import Lifecycle
    from .options import server_options
    from .process import run, server

    options = server_options(loaded, flags)
    logs.configure(options.log_format)
    keys = load_keys(options.api_key_file, _environment()["environ"])
    with bind(options.host, options.port, keys) as sock:
        url = _url("http" if options.tls_certificate is None else "https", options.host, sock)
        what = f"{loaded.config.model} ({loaded.config.runner.type})"
        lifecycle = Lifecycle(on_loaded=lambda: click.echo(f"serving {what} at {url}"), on_end=lambda: process.end())
        app = create_app(loaded, keys=keys, options=options, lifecycle=lifecycle)
        process = server(app, options, lifecycle, lambda: click.echo(f"listening at {url}, loading {what}"))
        run(process, sock)


@click.command(name="runner-serve", cls=EngineCommand)
@engine_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve at.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 = any free one.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the API keys, one a line; NANOVLLM_API_KEY may hold one, too.",
)
def runner_serve(loaded: Loaded, host: str, port: int, api_key_file: Path | None) -> None:
    """Serve a runner to other nanovllms.

    They reach it with `runner: {type: http, url: ...}` and keep their own scheduler. Without API keys only this machine
    is let in.
    """
    from nanovllm.aio import AsyncLLM

    from .bind import bind
    from .keys import load_keys
    from .limits import Limits
    from .runner_app import runner_app
    from .serving import serve

    keys = load_keys(api_key_file, os.environ)
    with bind(host, port, keys) as sock:  # before the model is loaded: a wrong address shows at once
        llm = AsyncLLM.from_config(loaded)
        line = f"serving {loaded.config.model} ({loaded.config.runner.type}) at {_url('http', host, sock)}"
        serve(runner_app(llm, keys, Limits()), sock, on_ready=lambda: click.echo(line))


def _url(scheme: str, host: str, sock: socket.socket) -> str:
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"
