"""The torch runner against the NumPy runner: every family and every variant of its config."""

from __future__ import annotations

import numpy as np
import pytest

import numpy_support
from model_cases import MODELS, VOCAB
from models_support import write_checkpoint
from torch_support import Driver, fill, make_runner


@pytest.mark.parametrize("name", MODELS)
def test_family(name, tmp_path):
    """Whole, chunked, a chunk beside decodes, on a shared prefix, over blocks in reverse order that hold NaN."""
    model_type, _, config = MODELS[name]
    write_checkpoint(tmp_path, config | {"model_type": model_type})
    runner, reference = make_runner(tmp_path), numpy_support.Driver(numpy_support.make_runner(tmp_path))
    rng = np.random.default_rng(0)
    long, short = rng.integers(0, VOCAB, 37).tolist(), rng.integers(0, VOCAB, 5).tolist()
    branch = long[:20] + short  # on 5 whole blocks of 4 tokens
    wanted, wanted_short, wanted_branch = (reference.logits(t, lane) for lane, t in enumerate((long, short, branch)))
    assert 0.1 < wanted.std() < 1e3  # the tolerance means something

    def equal(got: np.ndarray, *rows: np.ndarray) -> None:
        # rtol: one variant's logits reach 20, where each of our runners is 1e-4 away from float64.
        np.testing.assert_allclose(got, np.concatenate(rows), rtol=1e-5, atol=1e-4)

    fill(runner, np.nan)
    equal(Driver(runner).logits(long), wanted)
    equal(Driver(runner).logits(long, chunk=7), wanted)
    driver = Driver(runner, list(range(64))[::-1])
    driver.step((0, long, 0, 20, 0), (1, short, 0, 4, 0))
    equal(driver.step((0, long, 20, 37, 17), (1, short, 4, 5, 1)), wanted[20:], wanted_short[4:])
    driver.tables[2] = driver.tables[0][:5]
    equal(driver.step((2, branch, 20, 24, 4)), wanted_branch[20:24])
    decoded = driver.step((2, branch, 24, 25, 1), (0, long, 36, 37, 1), (1, short, 4, 5, 1))
    equal(decoded, wanted_branch[24:], wanted[36:], wanted_short[4:])
