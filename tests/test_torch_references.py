"""The torch runner against recorded references of real and random checkpoints (transformers, fp32)."""

from __future__ import annotations

import numpy as np
import pytest

from support import needs_data
from test_numpy_references import CHECKPOINTS, cases
from torch_support import Driver, make_runner

pytestmark = needs_data


@pytest.mark.parametrize("name", ["stories260k", "slm4096-gpt2"])
def test_greedy_ids_of_real_models_are_exact(name):
    runner = make_runner(CHECKPOINTS / name)
    for case in cases(name):
        wanted = case["greedy_new_ids"]
        assert Driver(runner).greedy(case["input_ids"], len(wanted)) == wanted


@pytest.mark.parametrize(
    "name",
    ["stories260k", "slm4096-gpt2", "random/gpt2", "random/qwen2", "random/qwen3", "random/llama-rope-llama3",
     "random/mistral-swa", "random/phi3", "random/qwen3-moe"],
)  # fmt: skip
def test_logits(name):
    runner = make_runner(CHECKPOINTS / name)
    for case in cases(name):
        rows = Driver(runner).logits(case["input_ids"]).astype(np.float64)
        last, top = rows[-1], case["last_logits_top5"]
        np.testing.assert_allclose(last[top["ids"]], top["values"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(last[:8], case["last_logits_first8"], rtol=0, atol=1e-4)
        log_sums = np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1)) + rows.max(-1)
        assert log_sums[-1] == pytest.approx(case["last_logsumexp"], abs=1e-4)
        if case["prompt_mean_nll"] is not None:
            targets = case["input_ids"][1:]
            nll = log_sums[:-1] - rows[np.arange(len(targets)), targets]
            assert nll.mean() == pytest.approx(case["prompt_mean_nll"], abs=1e-4)
