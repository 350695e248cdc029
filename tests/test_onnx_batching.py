"""However a batch is composed, chunked or laid out in blocks, a sequence's logits are its own: NumPy's."""

from __future__ import annotations

import numpy as np
import pytest

from models_support import write_checkpoint
from nanovllm.testing.runner_border import BorderTests
from nanovllm_runner_onnx import devices, pieces
from numpy_support import Driver
from onnx_support import fill, make_runner
from test_numpy_batching import MODELS, prompt

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

ROUNDING = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module", params=MODELS)
def path(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param), MODELS[request.param])


@pytest.fixture(scope="module")
def runner(path):
    return make_runner(path, num_blocks=200)


class TestBatching(BorderTests):
    """Over blocks that hold NaN from earlier owners."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, path):
        return {"model": str(path), "runner": {"type": "onnx", "threads": 1}, "tokenizer": "simple"}

    @pytest.fixture(autouse=True)
    def _spoilt(self, sound):
        fill(sound, np.nan)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_foreign_blocks_hold_reaches_nobody(runner, bad):
    tokens = [prompt(n, seed=n) for n in (3, 9, 30, 31)]
    fill(runner, 0)
    clean = [Driver(runner).logits(t)[-1] for t in tokens]
    fill(runner, bad)
    driver = Driver(runner, np.random.default_rng(0).permutation(200).tolist())
    driver.step(*((i, t, 0, len(t) - 1, 0) for i, t in enumerate(tokens)))
    decoded = driver.step(*((i, t, len(t) - 1, len(t), 1) for i, t in enumerate(tokens)))
    np.testing.assert_allclose(decoded, clean, **ROUNDING)


def test_one_sequence_with_nan_leaves_its_neighbours_alone(runner):
    tokens = [prompt(20, seed=i) for i in range(3)]
    driver = Driver(runner)
    driver.step(*((i, t, 0, 19, 0) for i, t in enumerate(tokens)))
    clean = driver.step(*((i, t, 19, 20, 1) for i, t in enumerate(tokens)))
    runner._pool.array[:, 1, driver.tables[1]] = np.nan
    poisoned = driver.step(*((i, t, 19, 20, 1) for i, t in enumerate(tokens)))
    assert np.isnan(poisoned[1]).all()
    np.testing.assert_allclose(poisoned[[0, 2]], clean[[0, 2]], **ROUNDING)


def test_no_input_of_a_step_is_ever_empty(runner, monkeypatch):
    """Operators of ONNX Runtime before 1.31 kill the process where there is nothing to compute."""
    step, shapes = devices.step_inputs, []

    def spy(*arguments):
        inputs = step(*arguments)
        shapes.extend(array.shape for array in inputs.values())
        return inputs

    monkeypatch.setattr(devices, "step_inputs", spy)
    driver, tokens = Driver(runner), prompt(20)
    driver.step((0, tokens, 0, 19, 0))  # a prefill of which nothing is wanted
    driver.step((0, tokens, 19, 20, 1))  # a decode alone
    driver.step((0, tokens, 19, 20, 1), (1, tokens, 0, 20, 20))  # both
    assert len(shapes) >= 3 * 11
    assert all(0 not in shape for shape in shapes)


@pytest.mark.parametrize("scratch", [1, 6_000, 20_000])
def test_a_step_that_needs_too_much_memory_is_cut_and_computes_the_same(runner, monkeypatch, scratch):
    tokens = [prompt(n, seed=n) for n in (2, 2, 5, 40, 1, 41, 90)]
    shuffled = np.random.default_rng(0).permutation(200).tolist()
    work = [(i, t, 0, len(t), len(t) // 2) for i, t in enumerate(tokens)]
    next_work = [(i, t, len(t) - 1, len(t), 1) for i, t in enumerate(tokens)]
    driver = Driver(runner, shuffled)
    whole = [driver.step(*work), driver.step(*next_work)]
    monkeypatch.setattr(pieces, "SCRATCH", scratch)
    ran = []
    run = runner._run
    monkeypatch.setattr(runner, "_run", lambda piece: ran.append(len(piece.input_ids)) or run(piece))
    fill(runner, np.nan)
    driver = Driver(runner, shuffled)
    for step, wanted in zip((work, next_work), whole, strict=True):
        np.testing.assert_allclose(driver.step(*step), wanted, **ROUNDING)
    assert sum(ran) == sum(map(len, tokens)) + len(tokens)
    assert len(ran) > 3
    assert scratch > 1 or set(ran) == {1}
