"""What every runner must give for the recorded references (transformers, fp32); a test hands in its own runner."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from numpy_support import Driver
from support import DATA

CHECKPOINTS = DATA / "checkpoints"
REAL = ["stories260k", "slm4096-gpt2"]
ALL = REAL + [
    f"random/{name}" for name in ("gpt2", "qwen2", "qwen3", "llama-rope-llama3", "mistral-swa", "phi3", "qwen3-moe")
]


def cases(name: str) -> list[dict]:
    return json.loads((CHECKPOINTS / name / "reference.json").read_text(encoding="utf-8"))["cases"]


def check_greedy_ids(drive: Callable[[], Driver], name: str) -> None:
    """`drive` gives a driver with lanes of its own at each call."""
    for case in cases(name):
        wanted = case["greedy_new_ids"]
        assert drive().greedy(case["input_ids"], len(wanted)) == wanted


def check_logits(drive: Callable[[], Driver], name: str) -> None:
    for case in cases(name):
        rows = drive().logits(case["input_ids"]).astype(np.float64)
        last, top = rows[-1], case["last_logits_top5"]
        np.testing.assert_allclose(last[top["ids"]], top["values"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(last[:8], case["last_logits_first8"], rtol=0, atol=1e-4)
        log_sums = np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1)) + rows.max(-1)
        assert log_sums[-1] == pytest.approx(case["last_logsumexp"], abs=1e-4)
        if case["prompt_mean_nll"] is not None:
            targets = case["input_ids"][1:]
            nll = log_sums[:-1] - rows[np.arange(len(targets)), targets]
            assert nll.mean() == pytest.approx(case["prompt_mean_nll"], abs=1e-4)
