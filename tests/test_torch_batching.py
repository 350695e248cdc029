"""However a batch is composed, chunked or laid out in blocks, a sequence's logits are its own: NumPy's."""

from __future__ import annotations

import numpy as np
import pytest

from models_support import write_checkpoint
from nanovllm.testing.runner_border import BorderTests
from test_numpy_batching import MODELS, prompt
from torch_support import Driver, attention, fill, make_runner

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
        runner = {"type": "torch", "threads": 1, "device": "cpu", "dtype": "fp32"}
        return {"model": str(path), "runner": runner, "tokenizer": "simple"}

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
    runner._pool.array[:, driver.tables[1], runner._pool.num_kv_heads :] = np.nan  # its V
    poisoned = driver.step(*((i, t, 19, 20, 1) for i, t in enumerate(tokens)))
    assert np.isnan(poisoned[1]).all()
    np.testing.assert_allclose(poisoned[[0, 2]], clean[[0, 2]], **ROUNDING)


@pytest.mark.parametrize("numbers", [1, 3_000, 20_000])
def test_attention_within_a_bound_of_memory_computes_the_same(runner, monkeypatch, numbers):
    """Decode groups and prefill chunks of every size, down to one sequence and one row."""
    tokens = [prompt(n, seed=n) for n in (2, 2, 5, 40, 1, 41, 90)]
    shuffled = np.random.default_rng(0).permutation(200).tolist()
    work = [(i, t, 0, len(t), len(t) // 2) for i, t in enumerate(tokens)]
    next_work = [(i, t, len(t) - 1, len(t), 1) for i, t in enumerate(tokens)]
    driver = Driver(runner, shuffled)
    whole = [driver.step(*work), driver.step(*next_work)]
    for name, value in (("GATHERED", {"cpu": numbers}), ("SCORES", numbers), ("ROWS_MIN", 1)):
        monkeypatch.setattr(attention, name, value)
    plans = []
    plan = attention.PagedAttention.plan
    monkeypatch.setattr(attention.PagedAttention, "plan", lambda *a: plans.append(plan(*a)) or plans[-1])
    fill(runner, np.nan)
    driver = Driver(runner, shuffled)
    for step, wanted in zip((work, next_work), whole, strict=True):
        np.testing.assert_allclose(driver.step(*step), wanted, **ROUNDING)
    chunks = [chunk for p in plans for prefill in p.prefills for chunk in prefill.chunks]
    groups = [decode for p in plans for decode in p.decodes]
    if numbers == 1:
        assert {chunk.last - chunk.first for chunk in chunks} == {1}
        assert {group.num_seqs for group in groups} == {1}
    heads, width = runner._model.spec.attention.num_heads, 2 * runner._model.spec.attention.head_size
    for chunk in chunks:
        assert chunk.last - chunk.first == 1 or (chunk.last - chunk.first) * chunk.right * heads <= numbers
    for group in groups:
        slots = len(group.runs) // (2 * runner._pool.num_kv_heads) * runner._pool.block_size
        held = slots - group.num_seqs * (runner._pool.block_size - 1)  # without what the last blocks round up
        assert group.num_seqs == 1 or held * runner._pool.num_kv_heads * width <= numbers


def test_one_long_context_makes_short_ones_pay_at_most_twice(runner):
    tokens = [prompt(n, seed=n) for n in (*range(1, 21), 120)]
    lengths = np.array([len(t) for t in tokens[:7]] + [120])
    attend = runner._model._attention
    groups = list(attend._groups(np.arange(8), lengths))
    assert sorted(i for group in groups for i in group) == list(range(8))
    for group in groups:
        assert lengths[group].max() <= 2 * lengths[group].min() + 64
