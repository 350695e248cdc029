"""Options that several commands share, those of plugins too:

    @click.command(cls=EngineCommand)
    @engine_options        # --config --profile --model --runner --tokenizer --set  -> loaded: Loaded
    @sampling_options      # --temperature --max-tokens ...               -> sampling: dict of what was given
    def mine(loaded, sampling): ...

This file knows no command and no engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

_ENGINE = (
    click.option("-c", "--config", "config_file", type=click.Path(path_type=Path), help="YAML configuration file."),
    click.option("--profile", help="A profile of the configuration file."),
    click.option("-m", "--model", help="Model directory, file or name.  [default: demo]"),
    click.option("-r", "--runner", help="Runner, such as numpy or mock."),
    click.option("--tokenizer", help="Tokenizer, such as hf or simple."),
    click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any configuration value."),
)

_SAMPLING = (
    click.option("--temperature", "--temp", type=float, help="0 = always the most likely token."),
    click.option("--max-tokens", type=int, help="Tokens to generate at most."),
    click.option("--top-k", type=int, help="Only the k most likely tokens."),
    click.option("--top-p", type=float, help="Only the likeliest tokens of this total probability."),
    click.option("--min-p", type=float, help="No token below this fraction of the likeliest one."),
    click.option("--repetition-penalty", type=float, help="Above 1 discourages tokens seen before."),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End at this text; may be repeated."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on after the end-of-text token."),
)

_SAMPLING_NAMES = (
    "temperature", "max_tokens", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "ignore_eos",
)  # fmt: skip

# Spellings of nano-vllm-go.
_GO_FLAGS = {"-model": "--model", "-temp": "--temperature", "-max-tokens": "--max-tokens"}


class EngineCommand(click.Command):
    """A command that also takes the single-dash spellings of nano-vllm-go."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [_GO_FLAGS.get(a, a) for a in args[:end]] + args[end:])


def engine_options(command: Callable[..., Any], environment: Callable[[], dict[str, Any]] = dict) -> Callable[..., Any]:
    """Adds the options that choose model and plugins; the command gets `loaded`, the checked configuration.

    `environment` is asked for `load`'s `environ` and `environ_aliases` where they are not the usual ones.
    """

    @functools.wraps(command)
    def wrapper(
        *, config_file: Path | None, profile: str | None, model: str | None, runner: str | None,
        tokenizer: str | None, sets: tuple[str, ...], **rest: Any,
    ) -> Any:  # fmt: skip
        from ..config import load

        flags = {"profile": profile, "model": model, "runner": runner, "tokenizer": tokenizer}
        given = {key: value for key, value in flags.items() if value is not None}
        loaded = load(config_file, sets=sets, overrides=given, override_origin="command line", **environment())
        return command(loaded=loaded, **rest)

    return _with(_ENGINE, wrapper)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the sampling options; the command gets `sampling`, keyword arguments of SamplingParams that were given."""

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        sampling = {name: values.pop(name) for name in _SAMPLING_NAMES}
        return command(sampling={k: v for k, v in sampling.items() if v is not None and v != ()}, **values)

    return _with(_SAMPLING, wrapper)


def distinct(names: Sequence[str]) -> list[str]:
    """Names of configurations that are compared: a file against itself shows the noise, and is told apart."""
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _with(options: tuple[Callable[..., Any], ...], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command
