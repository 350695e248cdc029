"""`nanovllm chat`: a conversation in the terminal, answers streamed as they come.

`Conversation` keeps the messages and fits them into the context; `chat` is the loop around it. On a terminal a
mistake is shown and the conversation goes on; with piped questions the first one ends the command.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import EngineClosed, EngineDead, NanoVLLMError, RequestError
from .ask import question_params
from .options import EngineCommand, engine_options, sampling_options
from .terminal import echo

if TYPE_CHECKING:
    from ..config import Loaded
    from ..llm import LLM
    from ..request import Delta, SamplingParams

_HELP = """\
/reset        forget the conversation, keep the system message
/system TEXT  set the system message; without TEXT, drop it
/save FILE    write the conversation as one JSON line, which `generate --input` takes
/help         this list
/exit         leave (also Ctrl-C or Ctrl-D)
Ctrl-C stops an answer. A space before the / sends the line as it stands."""


@dataclass
class Conversation:
    """The messages so far, and what answers them."""

    llm: LLM
    params: SamplingParams
    drops_oldest: bool  # may the oldest exchanges go when the context is full?
    system: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)  # user, assistant, user, assistant, ...

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*head, *self.history, *([] if question is None else [{"role": "user", "content": question}])]

    def answer(self, question: str) -> Generator[Delta, None, None]:
        """Deltas of the answer; what was said of it, interrupted or not, joins the history with its question.

        Raises RequestError, and the history stays as it was, if the conversation is refused or too long.
        """
        num_prompt = self._fit(question)
        room = None if num_prompt is None else self.llm.engine.max_len - num_prompt
        params = self.params
        if room is not None and params.max_tokens is not None:
            params = replace(params, max_tokens=min(room, params.max_tokens), min_tokens=min(room, params.min_tokens))
        said: list[str] = []
        try:
            for delta in self.llm.stream(self.messages(question), params):
                said.append(delta.text)
                yield delta
        finally:
            if text := "".join(said):
                self.history += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]

    def _fit(self, question: str) -> int | None:
        """Tokens of the prompt, after dropping what may be dropped; None where only the runner can count."""
        if self.llm.tokenizer is None:
            return None
        limit, wanted = self.llm.engine.max_len, self.params.max_tokens or 1
        num_prompt = len(self.llm.tokenizer.chat(self.messages(question)))
        if self.drops_oldest:
            while self.history and num_prompt + wanted > limit:
                del self.history[:2]
                num_prompt = len(self.llm.tokenizer.chat(self.messages(question)))
        if num_prompt >= limit:
            raise RequestError(
                f"the conversation has {num_prompt} tokens, and the context of {limit} must also hold the answer",
                hint="shorten the question"
                if not self.history
                else "/reset starts a new one; with --drop-oldest the oldest exchanges make room",
            )
        return num_prompt


@click.command(cls=EngineCommand)
@engine_options
@sampling_options
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option("--drop-oldest", is_flag=True, help="When the context is full, forget the oldest exchanges.")
@click.option("--stats", is_flag=True, help="After each answer, tokens and speed on stderr.")
def chat(loaded: Loaded, sampling: Mapping[str, Any], system: str | None, drop_oldest: bool, stats: bool) -> None:
    """Talk with the model.

    Ctrl-C stops an answer; at the prompt, it leaves, as Ctrl-D and /exit do. /help lists the commands. Questions
    can be piped in, one per line.
    """
    from ..llm import LLM

    is_terminal = sys.stdin.isatty()
    if not is_terminal and hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text do not end a conversation
    with LLM.from_config(loaded) as llm:
        conversation = Conversation(llm, question_params(llm, sampling), drop_oldest, system)
        if llm.tokenizer is not None:  # a model that cannot chat says so before the first question
            llm.tokenizer.chat(conversation.messages("?"))
        if is_terminal:
            with contextlib.suppress(ImportError):  # line editing and history, where the platform has them
                import readline  # noqa: F401
            echo(f"{loaded.config.model} on {loaded.config.runner.type}. /help lists the commands, /exit leaves.")
        while (line := _read_line(is_terminal)) is not None:
            try:
                if line.startswith("/"):
                    if not _obey(conversation, line):
                        return
                elif line.strip():
                    _answer(conversation, line.strip(), stats)
            except (EngineDead, EngineClosed):
                raise
            except NanoVLLMError as e:
                if not is_terminal:
                    raise
                click.echo(f"error: {e}", err=True)


def _read_line(is_terminal: bool) -> str | None:
    """The next line; None at the end: of the input, or by Ctrl-C or Ctrl-D at the prompt."""
    if not is_terminal:
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        echo()
        return None


def _answer(conversation: Conversation, question: str, wants_stats: bool) -> None:
    """Print the answer as it comes; an interrupt stops it."""
    num_tokens, last, is_stopped = 0, None, False
    try:
        with contextlib.closing(conversation.answer(question)) as deltas:
            for last in deltas:
                num_tokens += len(last.token_ids)
                echo(last.text, end="")
    except KeyboardInterrupt:
        is_stopped = True
        click.echo(f" (stopped after {num_tokens} tokens)", err=True, nl=False)
    finally:
        if num_tokens or is_stopped:  # a question that was refused has printed nothing
            echo()
    if is_stopped or last is None or last.output is None:
        return
    stats, limit = last.output.stats, conversation.llm.engine.max_len
    context = stats.num_prompt_tokens + stats.num_output_tokens
    if context >= limit:
        click.echo(f"(cut short: the context of {limit} tokens is full)", err=True)
    if wants_stats:
        first, rate = stats.ttft, stats.decode_tokens_per_second
        click.echo(
            f"({stats.num_prompt_tokens} tokens in, {stats.num_cached_tokens} of them cached; "
            f"{stats.num_output_tokens} out, first after {'-' if first is None else f'{first:.2f} s'}, "
            f"{'-' if rate is None else f'{rate:.0f}'} tok/s; context {context} of {limit})",
            err=True,
        )


def _obey(conversation: Conversation, line: str) -> bool:
    """Carry out a /command; False to leave."""
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    match command:
        case "/exit" | "/quit":
            return False
        case "/help":
            echo(_HELP)
        case "/reset":
            conversation.history.clear()
        case "/system":
            conversation.system = rest or None
        case "/save" if rest:
            document = json.dumps({"messages": conversation.messages()}, ensure_ascii=False)
            try:
                Path(rest).expanduser().write_text(document + "\n", encoding="utf-8", errors="backslashreplace")
            except (OSError, RuntimeError) as e:  # RuntimeError: no such user's home
                raise RequestError(f"{rest} cannot be written: {e}") from None
        case "/save":
            raise RequestError("/save needs a file name")
        case _:
            raise RequestError(f"unknown command {command}", hint="/help lists them")
    return True
