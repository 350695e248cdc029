"""`nanovllm demo`: small demonstrations with the embedded model, on any runner."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nanovllm.cli.ask import answer
from nanovllm.cli.options import EngineCommand, engine_options
from nanovllm.cli.terminal import echo

if TYPE_CHECKING:
    from nanovllm.config import Loaded

COUNTRIES = ("France", "Italy", "Germany", "Japan", "Spain", "England", "Russia", "China")


@click.group()
def demo() -> None:
    """Small demonstrations with the embedded model."""


@demo.command(cls=EngineCommand)
@engine_options
def capitals(loaded: Loaded) -> None:
    """Ask for eight capitals, in one batch."""
    from nanovllm.llm import LLM

    questions = [f"What is the capital of {country}?" for country in COUNTRIES]
    with LLM.from_config(loaded) as llm:
        outputs, _, failure = answer(llm, questions, {})
    for question, output in zip(questions, outputs, strict=True):
        echo(f"Q: {question} A: {' '.join(output.text.split())}")
    if failure is not None:
        raise failure
