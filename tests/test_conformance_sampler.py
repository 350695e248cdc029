"""SamplerConformance: both samplers of ours pass it, and every broken one is caught by its test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, settings

from broken_samplers import CAUGHT_BY, Changed
from conformance_support import failed, of
from nanovllm.testing import SamplerConformance
from nanovllm.testing.suite import searched
from support import REPO

NUMPY = {"sampler": "numpy"}  # the kind of logits


def test_a_sampler_that_keeps_the_order_passes_everything() -> None:
    found = of(SamplerConformance, Changed, NUMPY)
    assert {r.outcome for r in found.values()} == {"passed"}, failed(found)
    [note] = found["test_speed"].notes
    assert "times the speed of the NumPy sampler" in note


@pytest.fixture
def unshrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a counterexample is found is enough here: the smallest one takes seconds."""
    quick = settings(searched, phases=[Phase.generate])
    monkeypatch.setattr("nanovllm.testing.sampler.searched", quick)


@pytest.mark.usefixtures("unshrunk")
@pytest.mark.parametrize(("broken", "test"), CAUGHT_BY.items(), ids=[make.__name__ for make in CAUGHT_BY])
def test_what_is_broken_is_caught_by_its_test(broken: Callable[[], Any], test: str) -> None:
    found = of(SamplerConformance, broken, NUMPY, test)
    assert found[test].outcome == "failed"
    assert "\n" not in found[test].reason


def test_the_page_names_what_is_caught() -> None:
    page = (REPO / "docs" / "conformance.md").read_text("utf-8")
    assert {test for test in CAUGHT_BY.values() if f"`{test}`" not in page} == set()


class TestNumpy(SamplerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        return NUMPY


class TestTorch(SamplerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        pytest.importorskip("torch")
        return {"sampler": "torch"}
