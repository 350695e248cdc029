"""`nanovllm ask QUESTION...`: all questions in one batch, and a report of what answered them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from .options import EngineCommand, engine_options, sampling_options
from .terminal import echo, marks

if TYPE_CHECKING:
    from ..config import Loaded
    from ..errors import RequestFailed
    from ..llm import LLM
    from ..request import Output, SamplingParams


@click.command(cls=EngineCommand)
@click.argument("questions", nargs=-1, required=True, metavar="QUESTION...")
@engine_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def ask(questions: tuple[str, ...], loaded: Loaded, sampling: dict[str, Any], as_json: bool) -> None:
    """Ask one or more questions and print the answers.

    All questions run in one batch. The answer is the most likely one unless --temperature is given, and ends
    after a quarter of the model's context unless --max-tokens is given.
    """
    from ..llm import LLM

    with LLM.from_config(loaded) as llm:
        about = describe(llm, loaded)
        if not as_json:
            _print_loaded(about, len(questions))
        outputs, is_chat, failure = answer(llm, questions, sampling)
        speed = rates(llm)
    if as_json:
        answers = [
            {
                "question": question,
                "text": output.text,
                "token_ids": output.token_ids,
                "num_tokens": len(output.token_ids),
                "finish": str(output.finish),
                "error": output.error,
            }
            for question, output in zip(questions, outputs, strict=True)
        ]
        document = {"loaded": about, "chat": is_chat, "answers": answers, "stats": speed}
        echo(json.dumps(document, indent=2))
    else:
        _print_answers(questions, outputs, is_chat, speed)
    if failure is not None:
        raise failure


def answer(
    llm: LLM, questions: Sequence[str], sampling: Mapping[str, Any]
) -> tuple[list[Output], bool, RequestFailed | None]:
    """Outputs in the order of the questions; was the chat template used?; the failure, if one failed.

    A model without a chat template gets the questions as plain text.
    """
    from ..errors import RequestFailed, TokenizerError

    params = question_params(llm, sampling)
    is_chat = True
    try:
        try:
            outputs = llm.chat([[{"role": "user", "content": question}] for question in questions], params)
        except TokenizerError:
            is_chat = False
            outputs = llm.generate(list(questions), params)
    except RequestFailed as e:
        return e.outputs, is_chat, e
    return outputs, is_chat, None


def question_params(llm: LLM, sampling: Mapping[str, Any]) -> SamplingParams:
    """What answers a question unless `sampling` says otherwise: the likeliest tokens, a quarter of the context."""
    from ..request import SamplingParams

    return SamplingParams(**{"temperature": 0.0, "max_tokens": max(1, llm.info.max_model_len // 4), **sampling})


def describe(llm: LLM, loaded: Loaded) -> dict[str, Any]:
    """What was loaded."""
    from ..plugins import resolve_model

    _, path = resolve_model(loaded.config.model)
    return {
        "model": loaded.config.model,
        "path": None if path is None else str(path),
        "architecture": llm.info.description.get("architecture"),
        "vocab_size": llm.info.vocab_size,
        "eos_ids": list(llm.engine.eos_ids),
        "max_model_len": llm.info.max_model_len,
        "runner": loaded.config.runner.type,
        "tokenizer": None if llm.tokenizer is None else type(llm.tokenizer).__name__,
        "tokenizer_vocab_size": None if llm.tokenizer is None else llm.tokenizer.vocab_size,
    }


def rates(llm: LLM) -> dict[str, float | int | None]:
    """Tokens and tokens per second of everything so far; None where there was nothing to measure."""
    stats = llm.stats()
    return {
        "prefill_tokens": stats.num_prefill_tokens,
        "decode_tokens": stats.num_decode_tokens,
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
    }


def _print_loaded(about: Mapping[str, Any], num_questions: int) -> None:
    done = marks().done
    where = f" ({about['path']})" if about["path"] not in (None, about["model"]) else ""
    echo(f"{done} Model: {about['model']}{where}")
    for key, label in (
        ("architecture", "Architecture"), ("vocab_size", "Vocab size"), ("max_model_len", "Context"),
    ):  # fmt: skip
        if about[key] is not None:
            echo(f"  {label}: {about[key]}")
    echo(f"  EOS token: {', '.join(map(str, about['eos_ids'])) or 'none'}")
    echo(f"{done} Runner: {about['runner']}")
    vocabulary = f" (vocab: {about['tokenizer_vocab_size']})" if about["tokenizer"] else ""
    echo(f"{done} Tokenizer: {about['tokenizer'] or 'none, the runner tokenizes'}{vocabulary}")
    echo()
    echo(f"Questions: {num_questions}")


def _print_answers(
    questions: Sequence[str], outputs: Sequence[Output], is_chat: bool, speed: Mapping[str, float | int | None]
) -> None:
    line = marks().rule * 40
    if not is_chat:
        echo("The model has no chat template: the questions were sent as plain text.")
    echo(f"\n{line}\nRESULTS\n{line}")
    for number, (question, output) in enumerate(zip(questions, outputs, strict=True), 1):
        echo(f"\nQuestion {number}: {question}")
        echo(f"Answer: {output.text.strip()}")
        if output.error is not None:
            echo(f"Error: {output.error}")
        if output.token_ids or not output.text:  # a server that sends text only does not say
            echo(f"Tokens: {len(output.token_ids)}")
    prefill, decode = (
        "-" if rate is None else f"{rate:.0f}"
        for rate in (speed["prefill_tokens_per_second"], speed["decode_tokens_per_second"])
    )
    echo(f"\n{line}")
    echo(f"{marks().done} {len(outputs)} answered, {sum(len(o.token_ids) for o in outputs)} tokens")
    echo(f"Stats: Prefill {prefill} tok/s, Decode {decode} tok/s")
