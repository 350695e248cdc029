"""Alone: what each sequence gives when nothing else is computed, which it must give in any company. Knows no test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..components import Components
from ..request import Finish, Prompt, SamplingParams
from ..runner import LogitsRunner
from .driver import Doubles, Driver, Row
from .trial import Trial


class Alone:
    """Remembers what it computed, because tests ask for the same again."""

    def __init__(self, parts: Components) -> None:
        self._parts = parts
        self._rows: dict[tuple[int, ...], Doubles] = {}
        self._answers: dict[tuple[Any, str], tuple[tuple[int, ...], str]] = {}  # (prompt, params) -> (tokens, text)

    def logits(self, tokens: tuple[int, ...]) -> Doubles:
        """(vocab,) behind these tokens."""
        if tokens not in self._rows:
            runner = self._parts.runner
            assert isinstance(runner, LogitsRunner)
            self._rows[tokens] = Driver(runner).alone(tokens)
        return self._rows[tokens]

    def check(self, rows: Sequence[Row], rounding: float) -> None:
        for tokens, logits in rows:
            truth = self.logits(tokens)
            with np.errstate(invalid="ignore"):  # inf - inf
                difference = np.abs(logits - truth)
            same = (logits == truth) | (np.isnan(logits) & np.isnan(truth))
            worst = float(difference[~same].max(initial=0))
            assert worst <= rounding, (
                f"the logits behind {len(tokens)} tokens are {worst:.3g} away from those of the same tokens alone, "
                f"where {rounding:g} is allowed"
            )

    def check_answers(self, trial: Trial, rounding: float) -> None:
        """Every request that ended by itself gave what it gives alone: every row of logits, or else every token."""
        ended = [i for i, done in trial.answers.items() if done.finish in (Finish.STOP, Finish.LENGTH)]
        failed = [done.error for done in trial.answers.values() if done.error and "the test has" not in done.error]
        assert not failed, f"a request failed: {failed[0]}"
        if trial.witness is not None:
            self.check(trial.witness.rows, rounding)
            assert not trial.witness.strange, "it gives the sampler random numbers that are not those of the seeds"
            for i in ended:
                context, answer = tuple(trial.asked[i][0]), trial.answers[i].token_ids
                strays = [n for n, t in enumerate(answer) if ((*context, *answer[:n]), t) not in trial.witness.drawn]
                assert not strays, (
                    f"token {strays[0] + 1} of an answer is not what the engine's sampler drew for that sequence"
                )
            return
        for i in ended:
            (prompt, params), done = trial.asked[i], trial.answers[i]
            tokens, text = self.answer(prompt, params)
            assert done.token_ids == tokens, f"the tokens are {list(done.token_ids)}, and alone they are {list(tokens)}"
            assert done.text == text, f"the text is {done.text!r}, and alone it is {text!r}"

    def answer(self, prompt: Prompt, params: SamplingParams) -> tuple[tuple[int, ...], str]:
        """(tokens, text) of a request that has an engine for itself."""
        key = (tuple(prompt), repr(params))
        if key not in self._answers:
            with Trial(self._parts, prefix_caching=False) as trial:
                [done] = trial.answer([prompt], [params])
            assert done.error is None, f"a request failed: {done.error}"
            self._answers[key] = (tuple(done.token_ids), done.text)
        return self._answers[key]
