"""The command line. `nanovllm --help` imports no command: each is a name, a place and one line of help.

Errors end as one line on stderr and an exit status; `--debug` shows the traceback. Third-party commands
come from the entry-point group `nanovllm.commands` and are imported when they are invoked, never to list
them. This file knows no command's options.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from .. import __version__
from ..errors import NanoVLLMError

# name -> (module:attribute, one line of help)
_COMMANDS = {
    "ask": ("nanovllm.cli.ask:ask", "Ask one or more questions and print the answers."),
    "bench": ("nanovllm.cli.bench:bench", "Measure speed, latencies, engine overhead and memory."),
    "chat": ("nanovllm.cli.chat:chat", "Talk with the model."),
    "compare": ("nanovllm.cli.compare:compare", "Find the stage at which configurations differ."),
    "config": ("nanovllm.cli.config:config", "Show, check and describe the configuration."),
    "doctor": ("nanovllm.cli.doctor:doctor", "Find out what really runs here, and what is wrong."),
    "generate": ("nanovllm.cli.generate:generate", "Continue a text."),
    "logits": ("nanovllm.cli.logits:logits", "Show the likeliest next tokens."),
    "plugins": ("nanovllm.cli.plugins:plugins", "List, show, write and test plugins."),
}
# Help for commands of this project's own plugins; anybody else's shows its distribution's summary.
_PLUGIN_HELP = {
    "demo": "Small demonstrations with the embedded model.",
    "export": "Write a model in another format.",
    "inspect": "Describe a model.",
    "pull": "Download a model.",
    "runner-serve": "Serve a runner to other nanovllms.",
    "serve": "Serve a model over HTTP, with OpenAI's API and a page to look at.",
}

_EPILOG = """\b
Exit status:
  0    success
  1    an unexpected error (run again with --debug); of `logits`: another token than expected;
       of `compare`: something differs; of `doctor`: something is wrong; of `plugins test`: a test failed
  2    wrong usage, configuration or request
  3    a plugin is missing, broken or out of date
  4    the model or the tokenizer cannot be used
  5    the runner or the engine failed
  130  interrupted
"""


class _Commands(click.Group):
    """Knows its commands by name; imports one when it is invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from ..plugins import discover

        return sorted({*_COMMANDS, *(found.name for found in discover("commands"))})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in _COMMANDS:
            module, _, attribute = _COMMANDS[name][0].partition(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return plugin_command("commands", name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..plugins import discover

        lines = {name: text for name, (_, text) in _COMMANDS.items()}
        for found in discover("commands"):
            lines.setdefault(found.name, _PLUGIN_HELP.get(found.name) or summary(found.distribution))
        with formatter.section("Commands"):
            formatter.write_dl(sorted(lines.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise  # click's own, and a reader that has gone away: click ends quietly
        except BaseException as e:
            if ctx.params["debug"]:
                raise
            message, status = _explain(e)
            click.echo(message, err=True)
            ctx.exit(status)


def plugin_command(group: str, name: str) -> click.Command | None:
    """The command of that name in a group of plugins, imported; None if nobody has ever heard of it.

    Raises PluginError if it is not installed (with the pip line), broken, or no command.
    """
    from ..plugins import KINDS, discover, find, pip_hint

    if not any(found.name == name.partition("@")[0] for found in discover(group)) and not pip_hint(group, name):
        return None
    from ..loader import load_object

    command = load_object(find(group, name))
    if not isinstance(command, click.Command):
        from ..errors import PluginError

        raise PluginError(f"{KINDS[group]} '{name}' is a {type(command).__name__}, not a click command")
    return command


def _explain(e: BaseException) -> tuple[str, int]:
    if isinstance(e, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(e, NanoVLLMError):
        return f"error: {e}", e.exit_code
    if isinstance(e, Exception):
        return f"error: unexpected {type(e).__name__}: {e} (run again with --debug for the traceback)", 1
    raise e


def summary(distribution: str) -> str:
    """What an installed distribution says of itself in one line."""
    import importlib.metadata

    try:
        return importlib.metadata.metadata(distribution)["Summary"] or f"(from {distribution})"
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return f"(from {distribution})"


@click.group(cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nanovllm", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """One small, exact LLM engine; model runtimes are plugins chosen by a YAML file."""
    from .terminal import log_sentences

    log_sentences(with_tracebacks=debug)


def main() -> None:
    sys.exit(cli(prog_name="nanovllm"))
