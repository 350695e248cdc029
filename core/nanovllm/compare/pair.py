"""Pair: two answers to one prompt that began with the same ids, and the stage at which they part.

What logits call for is decided by the core's sampler, which draws again from what was recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..intake import ADJUSTING
from ..request import SamplingParams
from ..sampler import NumpySampler
from .encode import Tokenized
from .run import Answer, Run
from .scores import Gap, gap
from .stages import Difference, other_bytes


@dataclass(frozen=True, slots=True)
class Pair:
    """The answers of two configurations to one prompt; the first is the reference's."""

    index: int  # of the prompt
    runs: tuple[Run, Run]
    params: SamplingParams
    tolerance: float  # a difference of logits that counts as rounding

    @property
    def answers(self) -> tuple[Answer, Answer]:
        return self.runs[0].answers[self.index], self.runs[1].answers[self.index]

    @property
    def tokenized(self) -> tuple[Tokenized, Tokenized]:
        return self.runs[0].tokenized, self.runs[1].tokenized

    @property
    def num_equal(self) -> int:
        """Tokens until the answers part, or the shorter one ends."""
        a, b = (answer.token_ids for answer in self.answers)
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    def gaps(self) -> Iterator[Gap]:
        """Of every token up to the first that differs, where both show enough."""
        a, b = self.answers
        for k in range(min(self.num_equal + 1, len(a.token_ids), len(b.token_ids))):
            if (found := self._gap(k)) is not None:
                yield found

    def difference(self) -> Difference | None:
        """None: the answers are equal, as far as both runners show them."""
        a, b = self.answers
        k = self.num_equal
        if not a.shows_tokens or not b.shows_tokens:
            return self._other_text()
        if found := other_bytes(self.index, a.token_ids[:k], *self.tokenized):
            return found
        if k < min(len(a.token_ids), len(b.token_ids)):
            return self._other_token(k)
        if a.error is not None or b.error is not None:
            return self._failed(k)
        if not _end_alike(a, b):
            return self._found("stop", self._endings(), k)
        return self._other_text()

    # ------------------------------------------------------------------------------------- details

    def _found(self, stage: str, sentence: str, position: int | None, **more: Any) -> Difference:
        return Difference(prompt=self.index, stage=stage, sentence=sentence, position=position, **more)

    def _gap(self, k: int) -> Gap | None:
        a, b = (run.scores(self.index, k) for run in self.runs)
        drawn = self.answers[0].token_ids[k], self.answers[1].token_ids[k]
        return None if a is None or b is None else gap(a, b, drawn)

    def _other_token(self, k: int) -> Difference:
        drawn = [answer.token_ids[k] for answer in self.answers]
        pieces = [t.piece(token) for t, token in zip(self.tokenized, drawn, strict=True)]
        names = [t.name for t in self.tokenized]
        what = f"{names[0]} drew {pieces[0]}, {names[1]} {pieces[1]}"
        called_for = [self._called_for(run, k) for run in self.runs]
        found = self._gap(k)
        wrong = [
            f"the logits of {name} call for {t.piece(due)}"
            for name, t, due, token in zip(names, self.tokenized, called_for, drawn, strict=True)
            if due is not None and due != token
        ]
        agree = found is not None and found.largest <= self.tolerance
        if None not in called_for:
            # Logits that call for different tokens are at fault, unless that is rounding and a sampler did worse.
            stage = "sampler" if called_for[0] == called_for[1] or (agree and wrong) else "logits"
        elif found is not None:  # draws whose whole distribution is not shown
            stage = "sampler" if agree else "logits"
        else:
            stage = "sampler" if wrong else "unseen"
        if stage == "unseen":
            hidden = " and ".join(
                n for n, run in zip(names, self.runs, strict=True) if run.scores(self.index, k) is None
            )
            return self._found(stage, f"{what}: by its logits or by its sampler, which {hidden} does not show", k)
        is_tie = stage == "logits" and agree
        if wrong:
            what += f", but {' and '.join(wrong)}"
        if found is not None:
            what += (
                f"; their {found.unit} differ by up to {found.largest:.2g}, and the best two are "
                f"{found.margins[0]:.2g} and {found.margins[1]:.2g} apart"
            )
        if is_tie:
            what += f": a tie within the tolerance of {self.tolerance:g}"
        return self._found(stage, what, k, is_tie=is_tie, gap=found)

    def _called_for(self, run: Run, k: int) -> int | None:
        """The token that these logits call for, by docs/sampling-parameters.md; None where too little is shown."""
        drawn = run.drawn(self.index, k)
        if drawn is not None:
            sampled = NumpySampler().sample(drawn.logits[None], [drawn.row])
            return None if sampled.errors else int(sampled.ids[0])
        shown = run.scores(self.index, k)
        is_argmax = self.params.temperature == 0 and self.params.changed().isdisjoint(ADJUSTING)
        return int(shown.ids[shown.values.argmax()]) if shown is not None and is_argmax else None

    def _failed(self, k: int) -> Difference:
        """An answer that ended in an error: by what the sampler got, by the sampler, or elsewhere."""
        stage = "error"
        for run, answer in zip(self.runs, self.answers, strict=True):
            drawn = run.drawn(self.index, k)
            if answer.error is not None and drawn is not None:
                if not np.isfinite(drawn.logits.max()):  # samplers refuse NaN, an infinite logit, no finite one
                    stage = "logits"
                elif self._called_for(run, k) is not None:
                    stage = "sampler"
        told = [f"{t.name} failed: {a.error}" for t, a in zip(self.tokenized, self.answers, strict=True) if a.error]
        return self._found(stage, "; ".join(told), k)

    def _endings(self) -> str:
        told = [
            f"{t.name} ended after {len(a.token_ids)} tokens ({_reason(a, t)})"
            for t, a in zip(self.tokenized, self.answers, strict=True)
        ]
        ends = [t.eos_ids for t in self.tokenized]
        if set(ends[0]) != set(ends[1]):
            told.append(f"their end-of-text ids differ: {list(ends[0])} and {list(ends[1])}")
        return "; ".join(told)

    def _other_text(self) -> Difference | None:
        """The last thing to look at, and the only one where a runner gives text and no tokens."""
        a, b = self.answers
        names = [t.name for t in self.tokenized]
        if a.error is not None or b.error is not None:
            return self._failed(0)
        if a.text != b.text:
            pairs = enumerate(zip(a.text, b.text, strict=False))
            at = next((i for i, (x, y) in pairs if x != y), min(len(a.text), len(b.text)))
            shown = f"{names[0]} goes on with {a.text[at : at + 20]!r}, {names[1]} with {b.text[at : at + 20]!r}"
            if a.shows_tokens and b.shows_tokens:
                return self._found("tokenizer", f"the same tokens became other text: {shown}", None)
            hidden = " and ".join(n for n, x in zip(names, self.answers, strict=True) if not x.shows_tokens)
            return self._found("unseen", f"after {at} characters {shown}; {hidden} shows text and no tokens", None)
        return None if a.finish == b.finish else self._found("stop", self._endings(), None)


def _end_alike(a: Answer, b: Answer) -> bool:
    """Some servers do not say which token ended an answer, nor return it."""
    if a.finish != b.finish:
        return False
    if a.stop_reason is None or b.stop_reason is None:
        short, long = sorted((a, b), key=lambda answer: len(answer.token_ids))
        return long.token_ids in (short.token_ids, (*short.token_ids, long.stop_reason))
    return (a.token_ids, a.stop_reason) == (b.token_ids, b.stop_reason)


def _reason(answer: Answer, tokenized: Tokenized) -> str:
    reason = answer.stop_reason
    if isinstance(reason, int):
        return f"at its end-of-text id {reason}" if reason in tokenized.eos_ids else f"at the stop id {reason}"
    return str(answer.finish) if reason is None else f"at the stop string {reason!r}"
