"""However a batch is composed, chunked or laid out in blocks, a sequence's logits are its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import model_cases
from models_support import GPT2, LLAMA, QWEN2_WINDOW, QWEN3, write_checkpoint
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
def runner(request, tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp(request.param), MODELS[request.param])
    return make_runner(path, block_size=4, num_blocks=200)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, length).tolist()


def fill(runner, value: float) -> None:
    for pool in runner._pools:
        pool.k[...] = value
        pool.v[...] = value


@pytest.mark.parametrize("chunk", [1, 2, 3, 16, 49])
def test_chunked_equals_whole(runner, chunk):
    tokens = prompt(50)
    np.testing.assert_allclose(Driver(runner).logits(tokens, chunk=chunk), Driver(runner).logits(tokens), **ROUNDING)


def test_any_order_of_blocks_gives_the_same_logits(runner):
    tokens = prompt(50)
    whole = Driver(runner).logits(tokens)
    shuffled = np.random.default_rng(1).permutation(200).tolist()
    np.testing.assert_allclose(Driver(runner, shuffled).logits(tokens), whole, **ROUNDING)
    np.testing.assert_allclose(Driver(runner, shuffled).logits(tokens, chunk=1), whole, **ROUNDING)


@given(data=st.data())
@settings(max_examples=12)
def test_random_programs_equal_each_sequence_alone(runner, data):
    """Sequences of random lengths advance by random chunks in random company, over shuffled blocks that
    hold NaN from earlier owners."""
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=7))
    texts = [prompt(length, seed=i) for i, length in enumerate(lengths)]
    fill(runner, np.nan)
    driver = Driver(runner, np.random.default_rng(data.draw(st.integers(0, 99))).permutation(200).tolist())
    done = [0] * len(texts)
    rows: list[list[np.ndarray]] = [[] for _ in texts]
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        work = []
        for lane, text in enumerate(texts):
            left = len(text) - done[lane]
            take = data.draw(st.sampled_from([left, 1, 1, 1, 5, 0])) if left else 0
            if take := min(take, left):
                work.append((lane, text, done[lane], done[lane] + take, data.draw(st.integers(0, take))))
                done[lane] += take
        if not work:
            continue
        out = driver.step(*work)
        at = 0
        for lane, _, _, stop, wanted in work:
            rows[lane] += list(zip(range(stop - wanted, stop), out[at : at + wanted], strict=True))
            at += wanted
        assert at == len(out)
    fill(runner, 0)
    for text, got in zip(texts, rows, strict=True):
        alone = Driver(runner).logits(text)
        for position, row in got:
            np.testing.assert_allclose(row, alone[position], **ROUNDING)


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


def test_no_rows_wanted_computes_the_cache_all_the_same(runner):
    tokens = prompt(20)
    driver = Driver(runner)
    assert driver.step((0, tokens, 0, 19, 0)).shape == (0, runner.info.vocab_size)
    np.testing.assert_allclose(driver.step((0, tokens, 19, 20, 1))[0], Driver(runner).logits(tokens)[-1], **ROUNDING)
