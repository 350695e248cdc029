"""A comparison for people, as a table and sentences, and for programs, as JSON."""

from __future__ import annotations

import math
from typing import Any

from ..bench.tables import Table
from .comparison import Comparison, Verdict
from .perplexity import Perplexity
from .run import Run
from .stages import Difference


def heading(comparison: Comparison) -> str:
    number = len(comparison.prompts)
    return f"{number} prompt{'s' * (number != 1)}; the reference is {comparison.reference}"


def tables(comparison: Comparison, *, is_strict: bool = False) -> list[Table]:
    found = [_answers(comparison, is_strict) if comparison.runs else _tokenizers(comparison)]
    if any(run.perplexity is not None or run.unscored is not None for run in comparison.runs.values()):
        found.append(_perplexities(comparison))
    return found


def sentences(comparison: Comparison) -> list[str]:
    """Of each configuration the first difference of each stage, and how many more there are."""
    told = []
    for verdict in comparison.verdicts:
        alike: dict[str, list[Difference]] = {}
        for d in verdict.differences:
            alike.setdefault(f"{d.stage}{', a tie' * d.is_tie}", []).append(d)
        for stage, (first, *others) in alike.items():
            more = f" (and in {len(others)} more)" if others else ""
            told.append(f"{verdict.name}, {_place(comparison, first)}: {stage}{more}: {first.sentence}")
    return told


def document(comparison: Comparison, *, is_strict: bool) -> dict[str, Any]:
    return {
        "reference": comparison.reference,
        "differs": comparison.differs(is_strict=is_strict),
        "prompts": [p.content if isinstance(p.content, str) else list(p.content) for p in comparison.prompts],
        "configurations": {
            name: {"vocab_size": t.vocab_size, "eos_ids": list(t.eos_ids)}
            | (_run(comparison.runs[name]) if name in comparison.runs else {})
            for name, t in comparison.tokenized.items()
        },
        "comparisons": [_verdict(v, is_strict) for v in comparison.verdicts],
        "failures": {name: str(e) for name, e in comparison.failures.items()},
    }


# ------------------------------------------------------------------------------------------ tables


def _answers(comparison: Comparison, is_strict: bool) -> Table:
    rows = []
    for name, run in comparison.runs.items():
        verdict = comparison.verdict(name)
        facts = (name, str(run.facts["runner"]), str(run.facts["model"]), str(run.facts["dtype"] or ""))
        if verdict is None:
            rows.append((*facts, "reference", "", "", "", ""))
            continue
        rows.append(
            (
                *facts,
                verdict.stage(is_strict=is_strict) or "equal",
                _equal(verdict),
                str(verdict.num_ties),
                str(verdict.num_tokens),
                "not shown" if verdict.largest is None else f"{verdict.largest:.1e}",
            )
        )
    notes = []
    if any(v.unit != "logits" for v in comparison.verdicts):
        notes.append("Where a runner shows no logits, the last column is of log-probabilities.")
    if any(v.num_compared < len(comparison.prompts) for v in comparison.verdicts):
        notes.append("Conversations that neither configuration takes are left out.")
    header = (
        "configuration", "runner", "model", "dtype", "verdict", "equal answers", "ties", "equal tokens",
        "logits differ by",
    )  # fmt: skip
    return Table("Answers", header, rows, "\n".join(notes), num_text=5)


def _tokenizers(comparison: Comparison) -> Table:
    rows = []
    for name, t in comparison.tokenized.items():
        verdict = comparison.verdict(name)
        told = ("reference", "") if verdict is None else (verdict.stage(is_strict=True) or "equal", _equal(verdict))
        rows.append((name, told[0], told[1], str(t.vocab_size), ", ".join(map(str, t.eos_ids)) or "none"))
    header = ("configuration", "verdict", "equal prompts", "entries", "end-of-text ids")
    return Table("Tokenizers", header, rows, num_text=2)


def _perplexities(comparison: Comparison) -> Table:
    rows = []
    notes = []
    for name, run in comparison.runs.items():
        if run.perplexity is None:
            rows.append((name, "", "", "", ""))
            notes.append(f"{name}: {run.unscored}.")
            continue
        verdict = comparison.verdict(name)
        more = verdict.increase if verdict is not None else None
        told = "" if more is None else f"{more.ratio:+.2%} ± {more.error:.2%}"
        bits = run.perplexity.bits_per_byte
        scored = str(len(run.perplexity.logprobs))
        rows.append((name, f"{run.perplexity.value:.4f}", told, "" if bits is None else f"{bits:.4f}", scored))
        if verdict is not None and more is None and comparison.runs[comparison.reference].perplexity is not None:
            notes.append(f"{name} makes other tokens of the text, so only bits per byte can be compared.")
    header = ("configuration", "perplexity", "increase", "bits per byte", "scored tokens")
    return Table("Perplexity", header, rows, "\n".join(notes))


def _equal(verdict: Verdict) -> str:
    return f"{verdict.num_compared - sum(d.prompt is not None for d in verdict.differences)} of {verdict.num_compared}"


def _place(comparison: Comparison, difference: Difference) -> str:
    if difference.prompt is None:
        return "vocabulary"
    where = f"prompt {difference.prompt + 1} ({comparison.prompts[difference.prompt]})"
    return where if difference.position is None else f"{where}, token {difference.position}"


# -------------------------------------------------------------------------------------------- JSON


def _run(run: Run) -> dict[str, Any]:
    answers = [
        {
            "prompt_ids": encoded.ids,
            "token_ids": answer.token_ids,
            "text": answer.text,
            "finish": None if answer.finish is None else str(answer.finish),
            "stop_reason": answer.stop_reason,
            "error": encoded.refusal or answer.error,
        }
        for encoded, answer in zip(run.tokenized.encoded, run.answers, strict=True)
    ]
    return {**run.facts, "answers": answers, "perplexity": _perplexity(run.perplexity), "unscored": run.unscored}


def _perplexity(perplexity: Perplexity | None) -> dict[str, Any] | None:
    if perplexity is None:
        return None
    return {
        "value": _finite(perplexity.value),
        "bits_per_byte": perplexity.bits_per_byte,
        "scored_tokens": len(perplexity.logprobs),
    }


def _verdict(verdict: Verdict, is_strict: bool) -> dict[str, Any]:
    return {
        "name": verdict.name,
        "stage": verdict.stage(is_strict=is_strict),
        "prompts": verdict.num_compared,
        "equal_tokens": verdict.num_tokens,
        "largest_difference": _finite(verdict.largest),
        "unit": verdict.unit,
        "differences": [_difference(d) for d in verdict.differences],
        "perplexity_increase": None
        if verdict.increase is None
        else {"ratio": _finite(verdict.increase.ratio), "error": _finite(verdict.increase.error)},
    }


def _difference(difference: Difference) -> dict[str, Any]:
    gap = difference.gap
    return {
        "prompt": difference.prompt,
        "stage": difference.stage,
        "position": difference.position,
        "is_tie": difference.is_tie,
        "sentence": difference.sentence,
        "logits": None
        if gap is None
        else {
            "unit": gap.unit,
            "largest_difference": _finite(gap.largest),
            "largest_at": gap.at,
            "tokens": gap.tokens,
            "reference": [_finite(score) for score in gap.reference],
            "other": [_finite(score) for score in gap.other],
            "margins": [_finite(margin) for margin in gap.margins],
        },
    }


def _finite(number: float | None) -> float | None:
    """JSON has no infinity."""
    return number if number is not None and math.isfinite(number) else None
