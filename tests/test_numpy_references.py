"""The NumPy runner against recorded references of real and random checkpoints (transformers, fp32)."""

from __future__ import annotations

import pytest

from numpy_support import Driver, make_runner
from reference_cases import ALL, CHECKPOINTS, REAL, check_greedy_ids, check_logits
from support import needs_data

pytestmark = needs_data


@pytest.mark.parametrize("name", REAL)
def test_greedy_ids_of_real_models_are_exact(name):
    runner = make_runner(CHECKPOINTS / name)
    check_greedy_ids(lambda: Driver(runner), name)


@pytest.mark.parametrize("name", ALL)
def test_logits(name):
    runner = make_runner(CHECKPOINTS / name)
    check_logits(lambda: Driver(runner), name)
