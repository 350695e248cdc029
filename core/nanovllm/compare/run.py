"""One configuration's answers to all prompts, and its logits: a model is loaded, asked and let go of.

Knows the engine from outside; what the answers say about the configuration is stages.py's to judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from ..batch import TokenLogprob
from ..components import build
from ..config import Loaded
from ..engine import Engine
from ..errors import EngineDead, NanoVLLMError, RequestError
from ..face import engine_from_parts
from ..request import Completion, Finish, Request, SamplingParams
from ..runner import LogitsRunner
from . import scores
from .encode import Encoded, Ids, Tokenized, bytes_of, encode
from .perplexity import Perplexity, measure
from .prompts import Prompt
from .record import Drawn, Recorder

NUM_LOGPROBS = 5  # asked of runners that show no logits: the most that OpenAI's completions give


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one configuration made of one prompt."""

    token_ids: Ids = ()
    text: str = ""
    finish: Finish | None = None  # None: the request was refused
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None  # from runners without logits that have them
    error: str | None = None  # why there is no answer, or only the beginning of one; a refusal of its text is not here

    @property
    def shows_tokens(self) -> bool:
        """A server that takes text and gives text shows none."""
        return bool(self.token_ids) or not self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one configuration did."""

    facts: Mapping[str, Any]  # of the model and its parts, for people
    tokenized: Tokenized
    answers: tuple[Answer, ...]  # one per prompt
    recorder: Recorder | None  # None: the runner shows no logits
    perplexity: Perplexity | None  # None: no text was given, or
    unscored: str | None  # why the text could not be scored

    def drawn(self, prompt: int, token: int) -> Drawn | None:
        return None if self.recorder is None else self.recorder.drawn(prompt, token)

    def scores(self, prompt: int, token: int) -> scores.Scores | None:
        """What is known of the distribution that this token was drawn from."""
        drawn = self.drawn(prompt, token)
        if drawn is not None:
            return scores.of_logits(drawn.logits)
        logprobs = self.answers[prompt].logprobs
        return None if logprobs is None or token >= len(logprobs) else scores.of_logprobs(logprobs[token])

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()


def run(name: str, loaded: Loaded, prompts: Sequence[Prompt], params: SamplingParams, text: str | None) -> Run:
    """Load, answer every prompt, score the text, and close. Prompt i has the seed `params.seed + i`; there is one.

    Raises whatever NanoVLLMError keeps the configuration from being loaded or from taking these parameters; what
    goes wrong with one prompt is in its answer.
    """
    assert params.seed is not None, "by which the recorder tells prompts apart"
    parts = build(loaded)
    recorder = None if parts.sampler is None else Recorder(parts.sampler, params.seed)
    with ExitStack() as undo:
        if recorder is not None:
            undo.callback(recorder.close)
        with closing(engine_from_parts(replace(parts, sampler=recorder))) as engine:
            tokenizer = None if engine.info.tokenizes else engine.tokenizer
            encoded = tuple(encode(tokenizer, prompt) for prompt in prompts)
            answers = _answers(engine, prompts, encoded, params)
            tokenized = Tokenized(
                name=name,
                vocab_size=None if tokenizer is None else tokenizer.vocab_size,
                eos_ids=engine.eos_ids,
                encoded=encoded,
                token_bytes=bytes_of(engine.tokenizer, encoded, (answer.token_ids for answer in answers)),
            )
            if recorder is not None:
                recorder.is_recording = False
            perplexity, unscored = (None, None) if text is None else measure(engine, text)
            facts = _facts(engine, loaded, has_sampler=recorder is not None)
        undo.pop_all()
    return Run(
        facts=facts,
        tokenized=tokenized,
        answers=answers,
        recorder=recorder,
        perplexity=perplexity,
        unscored=unscored,
    )


def _answers(
    engine: Engine, prompts: Sequence[Prompt], encoded: Sequence[Encoded], params: SamplingParams
) -> tuple[Answer, ...]:
    shows_logits, supports = isinstance(engine.runner, LogitsRunner), engine.info.supports
    if params.temperature == 0 and not shows_logits:
        params = replace(params, seed=None)  # greedy needs none, and not every server takes one
    if not shows_logits and "logprobs" in supports:
        params = replace(params, logprobs=NUM_LOGPROBS)
    if unsupported := params.changed() - supports - {"max_tokens"}:
        raise RequestError(f"its runner does not support {', '.join(sorted(unsupported))}")

    answers = [Answer() for _ in prompts]
    live: dict[int, int] = {}  # request_id -> prompt
    for i, (prompt, given) in enumerate(zip(prompts, encoded, strict=True)):
        if given.refusal is not None:
            continue
        own = params if params.seed is None else replace(params, seed=(params.seed + i) % 2**64)
        content: Any = prompt.content if given.ids is None else given.ids
        try:
            ticket = engine.add(Request(prompt=content, params=own, parse_special=prompt.parse_special))
            live[ticket.request_id] = i
        except EngineDead:
            raise
        except NanoVLLMError as e:
            answers[i] = Answer(error=str(e))
    for request_id, completion in _completions(engine, live):
        answers[live[request_id]] = Answer(
            token_ids=completion.token_ids,
            text=completion.text,
            finish=completion.finish,
            stop_reason=completion.stop_reason,
            logprobs=completion.logprobs,
            error=completion.error,
        )
    return tuple(answers)


def _completions(engine: Engine, live: Iterable[int]) -> Iterable[tuple[int, Completion]]:
    missing = set(live)
    while missing:
        for delta in engine.step():
            if delta.output is not None:
                missing.discard(delta.request_id)
                yield delta.request_id, delta.output


def _facts(engine: Engine, loaded: Loaded, has_sampler: bool) -> dict[str, Any]:
    config = loaded.config
    sampler = engine.info.sampler if config.sampler.type == "auto" else config.sampler.type
    facts = {"model": config.model, "runner": config.runner.type, "sampler": sampler if has_sampler else None}
    described = {k: engine.info.description.get(k) for k in ("architecture", "dtype", "mode", "server")}
    return facts | {k: None if value is None else str(value) for k, value in described.items()}
