"""From checked options to a runner: servers, what they speak, and the mode that goes with it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from nanovllm.errors import ConfigError

from .extra import check_extra
from .options import HttpOptions
from .probe import probe
from .servers import open_servers

if TYPE_CHECKING:
    from nanovllm.hookspecs import Context
    from nanovllm.runner import ModelRunner


def create_runner(ctx: Context) -> ModelRunner:
    """Raises ConfigError, and RunnerError where no server can be reached or started."""
    options: HttpOptions = ctx.options
    with ExitStack() as undo:
        servers = open_servers(options)
        undo.callback(servers.close)
        dialect, facts = servers.agree(
            lambda server, patience: probe(server, options.dialect, ctx.tokenizer, options.model, patience=patience)
        )
        check_extra(dialect, options.extra)
        if ctx.tokenizer is None and not facts.takes_text:
            raise ConfigError(
                f"the server speaks {facts.dialect} and takes token ids only, so a tokenizer is needed",
                hint="set tokenizer: {type: http, url: ...}, or tokenizer.type and tokenizer.path",
            )
        is_step = options.mode == "step" or (options.mode == "auto" and dialect.name == "nanovllm")
        if is_step and dialect.name != "nanovllm":
            raise ConfigError(
                f"mode step needs a server that speaks nanovllm; this one speaks {dialect.name}", hint="set mode: auto"
            )
        if not is_step and dialect.name == "nanovllm":
            raise ConfigError("mode completion needs another dialect: nanovllm has steps only", hint="set mode: auto")
        runner: ModelRunner
        if is_step:
            from .step import StepRunner

            runner = StepRunner(servers, facts, options, ctx)
        else:
            from .completion import CompletionRunner

            runner = CompletionRunner(servers, dialect, facts, options, ctx)
        undo.pop_all()
        return runner
