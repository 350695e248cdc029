"""Requests from a JSONL file, answers to another: what `nanovllm generate --input IN --output OUT` does.

    {"prompt": "Once upon", "id": "a", "max_tokens": 20}    or {"messages": [{"role": "user", "content": "Hi"}]}
    {"index": 1, "id": "a", "text": " a time", ...}         or {"index": 2, "error": "..."}; index = line number

A window of requests is in flight, so prompts and answers take no memory beyond it; each answer is written and
flushed when it is done. Every output line carries a hash of its request. Run again, answers are kept, errors are
tried again, and an answer to another request than the one now in IN is refused. Knows no command line.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import EngineClosed, EngineDead, NanoVLLMError, RequestError
from ..progress import Progress
from ..request import Output, Request, SamplingParams, show

if TYPE_CHECKING:
    from ..batch import TokenLogprob
    from ..intake import Ticket
    from ..llm import LLM

_BEGINNING = b'{"index": '  # of every line of OUT
_SAMPLING = tuple(f.name for f in fields(SamplingParams))
_FIELDS = ("id", "prompt", "messages", *_SAMPLING)


@dataclass(frozen=True, slots=True)
class Item:
    """One line of IN."""

    index: int  # line number, from 1
    id: str | int | None
    hash: str  # of the line, the model and the command line's sampling: of all that decides the answer
    request: Request | None  # None: see error
    error: str | None = None

    @property
    def key(self) -> str:
        return _key(self.index, self.id)


@dataclass
class Counts:
    """Lines of IN, by what became of them."""

    answered: int = 0
    kept: int = 0  # were answered by an earlier run
    failed: int = 0


def answer_file(llm: LLM, source: Path, target: Path, model: str, sampling: Mapping[str, Any]) -> Counts:
    """Answer every request of `source` that has no answer in `target` yet.

    `sampling`: SamplingParams where a line says nothing else; `model` is part of what a line's hash covers.
    Raises RequestError for files that cannot be used; what is wrong with one line becomes a line of `target`.
    """
    try:
        if target.exists() and target.samefile(source):
            raise RequestError(f"{source} cannot be both input and output", hint="choose another --output")
        done, is_stale = _answered(target)
        with source.open("rb") as lines:
            seen: set[str] = set()
            num_items = 0
            for item in _items(lines, model, sampling):
                if item.key not in seen and done.get(item.key, item.hash) != item.hash:
                    raise RequestError(
                        f"{target} answers another request than line {item.index} of {source}: "
                        "the line, the model or an option has changed since",
                        hint="choose another --output",
                    )
                seen.add(item.key)
                num_items += 1
            if is_stale:
                _keep_answers(target)
            lines.seek(0)
            with target.open("ab") as out, Progress(num_items) as progress:
                return _Run(llm, out, done, progress).answer(_items(lines, model, sampling))
    except OSError as e:
        raise RequestError(f"{e.filename or target}: {e.strerror or e}", hint="check --input and --output") from e


class _Run:
    """The window of requests in flight, and where their answers go."""

    def __init__(self, llm: LLM, out: BinaryIO, done: Mapping[str, str], progress: Progress) -> None:
        self._llm, self._out, self._done, self._progress = llm, out, done, progress
        self._seen: set[str] = set()  # keys of this run's items
        self._live: dict[int, tuple[Item, Ticket]] = {}  # by request_id
        self._counts = Counts()
        self._num_started = 0  # items taken from the file

    def answer(self, items: Iterator[Item]) -> Counts:
        engine = self._llm.engine
        window = 2 * engine.scheduler.max_num_seqs  # a full batch, and as many ready to follow
        is_more = True
        while is_more or self._live:
            while is_more and len(self._live) < window:
                if (item := next(items, None)) is None:
                    is_more = False
                else:
                    self._start(item)
            for delta in engine.step() if self._live else ():
                if delta.output is not None:
                    item, ticket = self._live.pop(delta.request_id)
                    self._write(item, delta.error, ticket.output([delta.output]))
            stats, finished = engine.stats(), self._num_started - len(self._live)
            self._progress.update(finished, stats.prefill_tokens_per_second, stats.decode_tokens_per_second)
        return self._counts

    def _start(self, item: Item) -> None:
        self._num_started += 1
        if item.key in self._seen:
            self._write(item, f"id {show(item.id)} is that of an earlier line")
        elif item.key in self._done:
            self._counts.kept += 1
        elif item.request is None:
            self._write(item, item.error)
        else:
            try:
                ticket = self._llm.engine.add(item.request)
                self._live[ticket.request_id] = item, ticket
            except (EngineDead, EngineClosed):
                raise
            except NanoVLLMError as e:
                self._write(item, str(e))
        self._seen.add(item.key)

    def _write(self, item: Item, error: str | None, output: Output | None = None) -> None:
        row: dict[str, Any] = {"index": item.index} | ({} if item.id is None else {"id": item.id})
        if error is not None or output is None:
            self._counts.failed += 1
            row["error"] = error
        else:
            self._counts.answered += 1
            row |= {
                "text": output.text,
                "finish": str(output.finish),
                "num_prompt_tokens": len(output.prompt_token_ids),
                "num_tokens": len(output.token_ids),
            }
            for name in ("logprobs", "prompt_logprobs"):
                if (scores := getattr(output, name)) is not None:
                    row[name] = [None if s is None else _score(s) for s in scores]
        row["hash"] = item.hash
        line = json.dumps(row, ensure_ascii=False) + "\n"
        # A lone surrogate, in somebody's id, becomes \udc00: JSON's own way to write it.
        self._out.write(line.encode("utf-8", "backslashreplace"))
        self._out.flush()


def _answered(target: Path) -> tuple[dict[str, str], bool]:
    """Key -> hash of the answers in `target`; does it also have error lines, or a half-written last one?"""
    done: dict[str, str] = {}
    is_stale = False
    if not target.exists():
        return done, is_stale
    with target.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            is_whole = line.endswith(b"\n")
            row = _row(line) if is_whole else None
            if row is not None and "error" not in row:
                done[_key(row["index"], row.get("id"))] = row["hash"]
            elif row is not None or (not is_whole and line.startswith(_BEGINNING[: len(line)])):
                is_stale = True
            else:
                raise RequestError(
                    f"{target}, line {number}, was not written by this command", hint="choose another --output"
                )
    return done, is_stale


def _keep_answers(target: Path) -> None:
    """Remove all else, so that what has no answer gets its one line in this run."""
    rewritten = target.with_name(f"{target.name}.new")
    with target.open("rb") as lines, rewritten.open("wb") as out:
        out.writelines(line for line in lines if line.endswith(b"\n") and "error" not in (_row(line) or {}))
    os.replace(rewritten, target)


def _row(line: bytes) -> dict[str, Any] | None:
    """One line of OUT; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(row, dict) and type(row.get("index")) is int and isinstance(row.get("hash"), str)
    return row if ours else None


def _items(lines: Iterable[bytes], model: str, sampling: Mapping[str, Any]) -> Iterator[Item]:
    """Every line that is not blank, checked."""
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        covered = json.dumps([model, sampling, line.strip().decode("latin-1")], sort_keys=True)
        digest = hashlib.sha256(covered.encode()).hexdigest()[:32]
        name: str | int | None = None
        try:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise RequestError(f"not usable JSON: {e}") from None
            if not isinstance(row, dict):
                raise RequestError(f"a request is a JSON object, not {show(row)}")
            if type(row.get("id")) not in (str, int, type(None)):
                raise RequestError(f"id must be a text or a whole number, not {show(row['id'])}")
            name = row.get("id")
            yield Item(index, name, digest, _request(row, sampling))
        except RequestError as e:
            yield Item(index, name, digest, None, str(e))


def _request(row: Mapping[str, Any], sampling: Mapping[str, Any]) -> Request:
    for key in row:
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, 1)
            raise RequestError(
                f"unknown field {show(key)}",
                hint=f"did you mean '{near[0]}'?" if near else f"known: {', '.join(_FIELDS)}",
            )
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        raise RequestError("a request has either 'prompt' or 'messages'")
    if messages is not None and not (isinstance(messages, list) and messages and isinstance(messages[0], dict)):
        raise RequestError(f"messages must be a list of messages, not {show(messages)}")
    given = {**sampling, **{key: row[key] for key in _SAMPLING if key in row}}
    if isinstance(given.get("logit_bias"), dict):  # JSON's keys are texts
        try:
            given["logit_bias"] = {int(key): value for key, value in given["logit_bias"].items()}
        except ValueError:
            raise RequestError(f"logit_bias must map token ids to numbers, not {show(given['logit_bias'])}") from None
    chosen: Any = messages if prompt is None else prompt  # the engine checks what is in it
    return Request(prompt=chosen, params=SamplingParams(**given))


def _key(index: int, name: str | int | None) -> str:
    """What a line of IN and its line of OUT have in common: the id, else the line number."""
    return f"line {index}" if name is None else json.dumps(name)


def _score(score: TokenLogprob) -> dict[str, Any]:
    return {"id": score.token_id, "logprob": score.logprob, "rank": score.rank, "top": score.top}
