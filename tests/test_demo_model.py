"""The embedded model answers through the whole engine. All of evaluate.py's thresholds are held in the slow run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nanovllm import LLM, SamplingParams
from support import REPO

SCRIPTS = REPO / "scripts" / "demo_model"
SEED_CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo",
    "Spain": "Madrid", "England": "London", "Russia": "Moscow", "China": "Beijing",
}  # fmt: skip


def ask(llm: LLM, questions: list[str]) -> list[str]:
    conversations = [[{"role": "user", "content": q}] for q in questions]
    params = SamplingParams(temperature=0, max_tokens=48)
    return [o.text for o in llm.chat(conversations, params, show_progress=False)]


def test_the_embedded_model_knows_capitals_and_sums() -> None:
    facts: dict[str, str] = json.loads((SCRIPTS / "capitals.json").read_text("utf-8"))["capitals"]
    some = dict(sorted(facts.items())[::6]) | SEED_CAPITALS
    sums = [(a, b) for a in range(0, 11, 2) for b in range(1, 11, 3)]
    with LLM("demo") as llm:
        answers = ask(llm, [f"What is the capital of {c}?" for c in some])
        wrong = [a for a, capital in zip(answers, some.values(), strict=True) if capital not in a]
        assert len(wrong) <= len(some) * 0.03, wrong
        assert all(SEED_CAPITALS[c] in a for c, a in zip(some, answers, strict=True) if c in SEED_CAPITALS)
        totals = ask(llm, [f"What is {a} plus {b}?" for a, b in sums])
        right = sum(str(a + b) in text.replace(".", " ").split() for (a, b), text in zip(sums, totals, strict=True))
        assert right >= len(sums) * 0.95
        [declined] = ask(llm, ["What is the capital of Zorblax?"])
        assert "don't know" in declined


def test_the_embedded_model_fits_its_budget_and_describes_itself() -> None:
    with LLM("demo") as llm:
        directory = REPO / "plugins" / "models" / "nanovllm_models" / "demo"
        assert (directory / "model.safetensors").stat().st_size <= 4_000_000
        assert "nanovllm" in ask(llm, ["Who are you?"])[0]


@pytest.mark.slow
def test_every_threshold_of_the_evaluation_is_met() -> None:
    done = subprocess.run([sys.executable, str(SCRIPTS / "evaluate.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
