"""Evaluation of the demo model: held-out questions, greedy decoding, thresholds.

`evaluate(answer, complete)` is a pure function of two callables, one that answers chat
questions and one that continues plain texts. `train.py` calls it with a small PyTorch
generator on the fp16-rounded weights; run as a script, this file asks the engine:

    python scripts/demo_model/evaluate.py [MODEL]

MODEL is "demo" (the packaged model) unless told otherwise. The exit status is 1 when a
threshold is missed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from corpus import DECLINE_MARK, Item, completion_sets, evaluation_sets

MAX_TOKENS = 48
Generate = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class Row:
    """One line of the table. `threshold` is a share of 1, or None where only reported."""

    name: str
    right: int
    total: int
    threshold: float | None = None
    at_most: bool = False

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def met(self) -> bool:
        if self.threshold is None:
            return True
        return self.share <= self.threshold if self.at_most else self.share >= self.threshold


@dataclass
class Report:
    """All lines, and a few wrong answers of each for the reader."""

    rows: list[Row] = field(default_factory=list)
    wrong: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(row.met for row in self.rows)

    def table(self) -> str:
        lines = ["| set | right | of | share | threshold | met |", "|---|---:|---:|---:|---:|---|"]
        for row in self.rows:
            if row.threshold is None:
                bound, met = "reported only", ""
            else:
                bound = f"{'≤' if row.at_most else '≥'} {row.threshold:.0%}"
                met = "yes" if row.met else "NO"
            lines.append(f"| {row.name} | {row.right} | {row.total} | {row.share:.1%} | {bound} | {met} |")
        return "\n".join(lines)


def _contains(text: str, accepted: Sequence[str]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(a)}(?!\w)", text) for a in accepted)


def names_capital(text: str, item: Item) -> bool:
    """The capital stands in the part after the last "is" (in "The capital of Djibouti is
    ..." the country alone does not count), and the answer is no decline."""
    return DECLINE_MARK not in text and _contains(text.rsplit(" is ", 1)[-1], item.accepted)


def gives_number(text: str, item: Item) -> bool:
    """The last number of the answer is the result."""
    numbers = re.findall(r"\d+", text)
    return bool(numbers) and numbers[-1] in item.accepted


def says(text: str, item: Item) -> bool:
    return _contains(text, item.accepted)


def declines(text: str, item: Item) -> bool:
    return DECLINE_MARK in text


# name of the set: (how an answer is judged, least share of right ones or None)
_RULES: dict[str, tuple[Callable[[str, Item], bool], float | None]] = {
    "seed capitals": (names_capital, 1.0),
    "held-out phrasing 1": (names_capital, 0.97),
    "held-out phrasing 2": (names_capital, 0.97),
    "held-out phrasing 3": (names_capital, 0.97),
    "held-out phrasing 4": (names_capital, 0.97),
    "held-out phrasing 5": (names_capital, 0.97),
    "held-out fresh phrasing 1": (names_capital, None),
    "held-out fresh phrasing 2": (names_capital, None),
    "held-out fresh phrasing 3": (names_capital, None),
    "plain question": (names_capital, 0.97),
    "sloppy question": (names_capital, None),
    "terse question": (names_capital, None),
    "invented names": (declines, 0.9),
    "invented names, held-out phrasing": (declines, None),
    "famous invented names": (declines, None),
    "sums": (gives_number, 0.95),
    "sums, held-out phrasing": (gives_number, 0.95),
    "differences": (gives_number, None),
    "differences, held-out phrasing": (gives_number, None),
    "backwards, held-out phrasing 1": (says, None),
    "backwards, held-out phrasing 2": (says, None),
    "self-description": (says, None),
    "off-topic, held-out questions": (says, None),
    "completion": (names_capital, None),
    "completion, held-out phrasing": (names_capital, None),
}
_REAL_COUNTRIES = ["plain question", *(f"held-out phrasing {n}" for n in range(1, 6))]


def evaluate(answer: Generate, complete: Generate) -> Report:
    """Ask everything once and judge it. Both callables map prompts to greedy texts."""
    report = Report()
    declined = asked = 0
    jobs = [(answer, evaluation_sets()), (complete, completion_sets())]
    for generate, sets in jobs:
        for name, items in sets.items():
            judge, threshold = _RULES[name]
            texts = generate([item.prompt for item in items])
            verdicts = [judge(text, item) for text, item in zip(texts, items, strict=True)]
            report.rows.append(Row(name, sum(verdicts), len(items), threshold))
            report.wrong[name] = [
                (item.prompt, text) for item, text, ok in zip(items, texts, verdicts, strict=True) if not ok
            ]
            if name in _REAL_COUNTRIES:
                declined += sum(declines(text, item) for text, item in zip(texts, items, strict=True))
                asked += len(items)
    report.rows.append(Row("real countries declined", declined, asked, 0.02, at_most=True))
    return report


def print_report(report: Report, examples: int = 5) -> None:
    print(report.table())
    for name, wrong in report.wrong.items():
        for prompt, text in wrong[:examples]:
            print(f"  wrong [{name}] {prompt!r} -> {text!r}")


def main() -> int:
    from nanovllm import LLM, SamplingParams

    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    with LLM(model) as llm:

        def answer(questions: list[str]) -> list[str]:
            chats = [[{"role": "user", "content": question}] for question in questions]
            return [output.text for output in llm.chat(chats, params)]

        def complete(starts: list[str]) -> list[str]:
            return [output.text for output in llm.generate(starts, params)]

        report = evaluate(answer, complete)
    print_report(report)
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
