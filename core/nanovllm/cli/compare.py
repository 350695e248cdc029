"""`nanovllm compare A.yaml B.yaml [...]`: does changing the configuration change the answers, and at which stage?"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import distinct, sampling_options
from .terminal import echo, printable

if TYPE_CHECKING:
    from ..compare.prompts import Prompt


@click.command
@click.argument("configs", nargs=-1, type=click.Path(path_type=Path), metavar="CONFIG.yaml CONFIG.yaml...")
@click.option("-m", "--model", help="Model directory, file or name, for all.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any configuration value, for all.")
@click.option("--profile", "profiles", multiple=True, help="A profile of each file; may be repeated to compare them.")
@click.option("--prompt", "texts", multiple=True, help="What to ask; may be repeated.  [default: built-in prompts]")
@click.option("--prompts", "file", type=click.Path(path_type=Path), help="A prompt per line; .jsonl: prompt, messages.")
@click.option("--chat", "as_chat", is_flag=True, help="Ask --prompt and --prompts with the chat template.")
@sampling_options
@click.option("--text", "text_file", type=click.Path(path_type=Path), help="Compare perplexities over this text.")
@click.option("--tokenizers", "only_tokenizers", is_flag=True, help="Compare the tokenizers; load no model.")
@click.option("--tolerance", type=click.FloatRange(0), help="Difference of logits that is rounding.  [default: 0.001]")
@click.option("--strict", "is_strict", is_flag=True, help="Ties within the tolerance are differences, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def compare(
    ctx: click.Context, configs: tuple[Path, ...], model: str | None, sets: tuple[str, ...],
    profiles: tuple[str, ...], texts: tuple[str, ...], file: Path | None, as_chat: bool, sampling: dict[str, Any],
    text_file: Path | None, only_tokenizers: bool, tolerance: float | None, is_strict: bool, as_json: bool,
) -> None:  # fmt: skip
    """Find the stage at which configurations differ.

    All are asked the same: greedy and 32 tokens unless --temperature and --max-tokens say otherwise. The first
    one is the reference. The exit status is 1 if something differs. docs/compare.md defines the stages.
    """
    from ..bench.tables import terminal
    from ..compare import show
    from ..compare.comparison import TOLERANCE, compare_answers, compare_tokenizers
    from ..compare.prompts import BUILT_IN, HARD_TO_TOKENIZE, read_text
    from ..config import load
    from ..errors import ConfigError
    from ..request import SamplingParams

    chosen = [(path, profile) for path in configs for profile in profiles or (None,)]
    if len(chosen) < 2:
        raise ConfigError(
            f"compare takes two configurations or more, not {len(chosen)}",
            hint="for example: nanovllm compare a.yaml b.yaml, or a.yaml --profile one --profile other",
        )
    if only_tokenizers and (sampling or text_file is not None or tolerance is not None):
        raise click.UsageError("--tokenizers loads no model: there are no answers to sample, to score or to tolerate")
    if tolerance is not None and math.isnan(tolerance):
        raise click.BadParameter("nan is not a number", param_hint="--tolerance")
    configurations = []
    names = distinct([str(path) if profile is None else f"{path} {profile}" for path, profile in chosen])
    for name, (path, profile) in zip(names, chosen, strict=True):
        flags = {key: value for key, value in (("model", model), ("profile", profile)) if value is not None}
        configurations.append((name, load(path, sets=sets, overrides=flags, override_origin="command line")))
    prompts = _prompts(texts, file, as_chat)
    if only_tokenizers:
        comparison = compare_tokenizers(configurations, prompts or HARD_TO_TOKENIZE)
    else:
        comparison = compare_answers(
            configurations,
            prompts or BUILT_IN,
            SamplingParams(**{"temperature": 0, "max_tokens": 32, "seed": 0, **sampling}),
            tolerance=TOLERANCE if tolerance is None else tolerance,
            text=None if text_file is None else read_text(text_file),
            on_progress=_progress,
        )
    if as_json:
        # What plugins say of themselves may be of any type.
        echo(json.dumps(show.document(comparison, is_strict=is_strict), indent=2, allow_nan=False, default=str))
    else:
        echo(terminal(show.heading(comparison), show.tables(comparison, is_strict=is_strict)))
        for sentence in show.sentences(comparison):
            echo(f"\n{printable(sentence)}")
    for failure in comparison.failures.values():
        click.echo(f"error: {failure}", err=True)
    statuses = [failure.exit_code for failure in comparison.failures.values()]
    ctx.exit(statuses[0] if statuses else int(comparison.differs(is_strict=is_strict)))


def _prompts(texts: tuple[str, ...], file: Path | None, as_chat: bool) -> tuple[Prompt, ...]:
    from ..compare.prompts import from_file, from_text

    if as_chat and not texts and file is None:
        raise click.UsageError("--chat is for --prompt and --prompts; the built-in prompts have both kinds")
    return (
        *(from_text(text, as_chat) for text in texts),
        *(() if file is None else from_file(file, as_chat)),
    )


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        click.echo(text, err=True)
