"""Trial: an engine around a runner that others use too, its requests, and what came of them.

For runners that return logits it also remembers every row that was sampled. Knows no test and no reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .. import rng
from ..batch import Batch, KVLayout, Packed, RunnerInfo, Sampled, SampleRow, SeqOutput
from ..components import Components
from ..engine import Engine
from ..request import Completion, Delta, Prompt, Request, SamplingParams
from ..runner import LogitsRunner, ModelRunner, Sampler
from .driver import Row, as_float64


class Trial:
    """Use as a context manager: what still runs at its end is aborted."""

    def __init__(self, parts: Components, *, kv: KVLayout | None = None, **options: Any) -> None:
        """`kv`: a smaller one than the runner's; `options`: the engine's."""
        info = parts.runner.info if kv is None else replace(parts.runner.info, kv=kv)
        is_logits = isinstance(parts.runner, LogitsRunner)
        self.witness = Witness(parts.sampler) if is_logits and parts.sampler is not None else None
        scheduler = parts.loaded.config.scheduler
        sizes = {"max_num_seqs": info.max_num_seqs, "max_num_batched_tokens": scheduler.max_num_batched_tokens}
        runner = (_LentLogits if is_logits else _Lent)(parts.runner, info)
        self.engine = Engine(runner, parts.tokenizer, sampler=self.witness, **(sizes | options))
        self.asked: dict[int, tuple[Prompt, SamplingParams]] = {}  # request id -> what for
        self.answers: dict[int, Completion] = {}  # request id -> its end

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *exception: object) -> None:
        self.engine.close()

    def add(self, prompt: Prompt, params: SamplingParams) -> int:
        """Returns the request's id."""
        request_id = self.engine.add(Request(prompt=prompt, params=params)).request_id
        self.asked[request_id] = (prompt, params)
        return request_id

    def step(self) -> None:
        for delta in self.engine.step():
            if delta.output is not None:
                self.answers[delta.request_id] = delta.output

    def finish(self) -> Trial:
        while self.engine.has_work:
            self.step()
        return self

    def deltas(self, request: Request) -> list[Delta]:
        """All that comes of a request that is asked by itself, as it comes."""
        self.engine.add(request)
        found = []
        while self.engine.has_work:
            found += self.engine.step()
        return found

    def answer(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Completion]:
        """The answers to all of these, asked at once."""
        asked = [self.add(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        self.finish()
        return [self.answers[i] for i in asked]


class Witness:
    """Stands before a sampler and remembers what it was given."""

    def __init__(self, sampler: Sampler) -> None:
        self.rows: list[Row] = []  # where a token was drawn
        self.drawn: set[tuple[tuple[int, ...], int]] = set()  # (context, token)
        self.strange: list[int] = []  # contexts, by length, whose random number is not their seed's
        self.failing: tuple[int, ...] | None = None  # the context for which it gives an error
        self._sampler = sampler

    def sample(self, logits: Any, rows: Sequence[SampleRow]) -> Sampled:
        sampled, errors = self._sampler.sample(logits, rows), {}
        for i, (row, values) in enumerate(zip(rows, as_float64(logits), strict=True)):
            if row.target is not None:
                continue
            context, sampling = tuple(row.context.tolist()), row.sampling
            self.rows.append(Row(context, values))
            self.drawn.add((context, int(sampled.ids[i])))
            if context == self.failing:
                errors[i] = "the test has this request fail"
            [uniform] = rng.uniforms([sampling.seed], [sampling.completion_index], [len(context)])
            if not sampling.is_greedy and row.uniform != uniform:
                self.strange.append(len(context))
        return sampled._replace(errors={**sampled.errors, **errors})


class _Lent(ModelRunner):
    """The runner with other facts, which stays open when its engine closes."""

    def __init__(self, runner: ModelRunner, info: RunnerInfo) -> None:
        self._runner = runner
        self._info = info

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def execute(self, batch: Batch) -> list[SeqOutput]:
        return self._runner.execute(batch)

    def release(self, seq_id: int, lane: int) -> None:
        self._runner.release(seq_id, lane)

    def wake(self) -> None:
        self._runner.wake()


class _LentLogits(_Lent, LogitsRunner):
    _runner: LogitsRunner

    def forward(self, packed: Packed) -> Any:
        return self._runner.forward(packed)

    def execute(self, batch: Batch) -> list[SeqOutput]:
        self._runner.sampler = self.sampler
        return self._runner.execute(batch)
