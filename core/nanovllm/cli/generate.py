"""`nanovllm generate [PROMPT...]`: the prompt as given, and its continuation as it comes; or a file of requests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .ask import rates
from .options import EngineCommand, engine_options, sampling_options
from .terminal import echo

if TYPE_CHECKING:
    from ..config import Loaded


@click.command(cls=EngineCommand)
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@engine_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document; text and token ids apart.")
@click.option("--input", "source", type=click.Path(path_type=Path), help="JSONL file of requests.")
@click.option("--output", "target", type=click.Path(path_type=Path), help="JSONL file of their answers.")
def generate(
    prompts: tuple[str, ...], loaded: Loaded, sampling: dict[str, Any], as_json: bool,
    source: Path | None, target: Path | None,
) -> None:  # fmt: skip
    """Continue a text.

    One PROMPT is continued as the tokens come; several run in one batch. Without PROMPT the text is read from
    standard input.

    With --input and --output, each line of the one, {"prompt": TEXT} or {"messages": [...]} with an optional "id"
    and sampling parameters, becomes a line of the other. Run again after an interruption, it does what is left.
    """
    from ..llm import LLM
    from ..request import SamplingParams

    if source is not None or target is not None:
        if source is None or target is None or prompts or as_json:
            raise click.UsageError("--input and --output go together, without PROMPT and --json")
        _answer_file(loaded, source, target, sampling)
        return
    if not prompts:
        if sys.stdin.isatty():
            raise click.UsageError("give a PROMPT, or pipe a text in")
        prompts = (sys.stdin.read().removesuffix("\n"),)
    params = SamplingParams(**sampling)
    with LLM.from_config(loaded) as llm:
        if len(prompts) == 1 and not as_json:
            deltas = llm.stream(prompts[0], params)  # a request that is refused has printed nothing
            echo(prompts[0], end="")
            for delta in deltas:
                echo(delta.text, end="")
            echo()
            return
        outputs = llm.generate(list(prompts), params)
        speed = rates(llm)
    if as_json:
        rows = [
            {
                "prompt": prompt,
                "text": output.text,
                "prompt_token_ids": list(output.prompt_token_ids),
                "token_ids": output.token_ids,
                "finish": str(output.finish),
            }
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        echo(json.dumps({"outputs": rows, "stats": speed}, indent=2))
        return
    echo("\n---\n".join(prompt + output.text for prompt, output in zip(prompts, outputs, strict=True)))


def _answer_file(loaded: Loaded, source: Path, target: Path, sampling: dict[str, Any]) -> None:
    from ..errors import RequestFailed
    from ..llm import LLM
    from .jsonl import answer_file

    with LLM.from_config(loaded) as llm:
        counts = answer_file(llm, source, target, loaded.config.model, sampling)
    kept = f", {counts.kept} kept" if counts.kept else ""
    summary = f"{target}: {counts.answered} answered{kept}, {counts.failed} failed"
    if counts.failed:
        raise RequestFailed(summary, hint='its lines with "error" say why')
    click.echo(summary, err=True)
