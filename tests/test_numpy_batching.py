"""However a batch is composed, chunked or laid out in blocks, a sequence's logits are its own."""

from __future__ import annotations

import numpy as np
import pytest

import model_cases
from models_support import GPT2, LLAMA, QWEN2_WINDOW, QWEN3, write_checkpoint
from nanovllm.testing.runner_border import BorderTests
from nanovllm_runner_numpy import attention
from numpy_support import Driver, make_runner

MODELS = {"gpt2": GPT2, "llama": LLAMA, "qwen2-window": QWEN2_WINDOW, "qwen3": QWEN3} | {
    name: model_cases.MODELS[name][2]
    | {"model_type": model_cases.MODELS[name][0], "max_position_embeddings": 128, "vocab_size": 61}
    for name in (
        "falcon-rw-alibi",
        "gemma2",
        "gemma3_text",
        "gpt_neox",
        "granitemoe-32-experts-top-8-tied",
        "olmo2",
        "phi-qk-norm-gqa-tied",
        "qwen2_moe-window",
        "smollm3-list-window-untied",
    )
}
ROUNDING = {"rtol": 0, "atol": 5e-5}


@pytest.fixture(scope="module", params=MODELS)
def path(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param), MODELS[request.param])


@pytest.fixture(scope="module")
def runner(path):
    return make_runner(path, block_size=4, num_blocks=200)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, length).tolist()


def fill(runner, value: float) -> None:
    for pool in runner._pools:
        pool.k[...] = value
        pool.v[...] = value


class TestBatching(BorderTests):
    """Over blocks that hold NaN from earlier owners."""

    rounding = 5e-5

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, path):
        return {"model": str(path), "runner": "numpy", "tokenizer": "simple"}

    @pytest.fixture(autouse=True)
    def _spoilt(self, sound):
        fill(sound, np.nan)


def test_nan_in_freed_blocks_reaches_nobody(runner):
    tokens = [prompt(n, seed=n) for n in (3, 9, 30, 31)]
    fill(runner, 0)
    clean = [Driver(runner).logits(t)[-1] for t in tokens]
    for bad in (np.nan, np.inf):
        fill(runner, bad)
        driver = Driver(runner, np.random.default_rng(0).permutation(200).tolist())
        driver.step(*((i, t, 0, len(t) - 1, 0) for i, t in enumerate(tokens)))
        decoded = driver.step(*((i, t, len(t) - 1, len(t), 1) for i, t in enumerate(tokens)))
        np.testing.assert_allclose(decoded, clean, **ROUNDING)
    fill(runner, 0)


def test_one_sequence_with_nan_leaves_its_neighbours_alone(runner):
    tokens = [prompt(20, seed=i) for i in range(3)]
    driver = Driver(runner)
    driver.step(*((i, t, 0, 19, 0) for i, t in enumerate(tokens)))
    clean = driver.step(*((i, t, 19, 20, 1) for i, t in enumerate(tokens)))
    for pool in runner._pools:
        pool.v[driver.tables[1]] = np.nan
    poisoned = driver.step(*((i, t, 19, 20, 1) for i, t in enumerate(tokens)))
    assert np.isnan(poisoned[1]).all()
    np.testing.assert_allclose(poisoned[[0, 2]], clean[[0, 2]], **ROUNDING)  # experts lose a row: another product
    fill(runner, 0)


def test_small_scratch_and_small_score_chunks_change_nothing(runner, monkeypatch):
    tokens = [prompt(n, seed=n) for n in (2, 2, 5, 40, 41, 90)]
    work = [(i, t, len(t) - 1, len(t), 1) for i, t in enumerate(tokens)]

    def run() -> tuple[np.ndarray, np.ndarray]:
        driver = Driver(runner, np.random.default_rng(0).permutation(200).tolist())
        filled = driver.step(*((i, t, 0, len(t), len(t)) for i, t in enumerate(tokens)))
        return filled, driver.step(*work)

    big = run()
    monkeypatch.setattr(attention, "SCRATCH", 1)
    monkeypatch.setattr(attention, "SCORES", 1)
    small = run()
    np.testing.assert_allclose(small[0], big[0], **ROUNDING)
    np.testing.assert_allclose(small[1], big[1], **ROUNDING)
