"""What every conformance suite is made of: its levels, expected failures, and skips with a reason.

A suite is a class of plain pytest methods; an author subclasses it with one fixture, and needs no pytest
plugin. This file knows no runner, no tokenizer, no sampler and no model family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import hypothesis
import pytest

LEVELS = ("basic", "batched", "paged", "robust", "deterministic", "fast")

_Test = TypeVar("_Test", bound=Callable[..., Any])

# The same examples in every run, on every machine; a plugin may be slow.
searched = hypothesis.settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),  # not `explain`, which traces every line
    report_multiple_bugs=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def level(name: str) -> Callable[[_Test], _Test]:
    """Says what a test proves: `@level("paged")`; one of LEVELS."""
    assert name in LEVELS, f"there is no level {name!r}; the levels are {', '.join(LEVELS)}"

    def put(test: _Test) -> _Test:
        test.level = name  # type: ignore[attr-defined]
        return test

    return put


class Conformance:
    """Base of the suites: RunnerConformance, TokenizerConformance, SamplerConformance, FamilyConformance."""

    expected_failures: Mapping[str, str] = {}
    """Test -> why the plugin does not pass it. One that passes after all is a failure."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises TypeError for an expected failure without a test or without a reason."""
        super().__init_subclass__(**kwargs)
        for name, reason in cls.expected_failures.items():
            if not name.startswith("test_") or not callable(getattr(cls, name, None)):
                raise TypeError(f"{cls.__name__}.expected_failures names {name!r}, which is none of its tests")
            if not isinstance(reason, str) or not reason.strip():
                raise TypeError(f"{cls.__name__}.expected_failures[{name!r}] needs a reason")

    @pytest.fixture(autouse=True)
    def _expect_failure(self, request: pytest.FixtureRequest) -> None:
        if (reason := self.expected_failures.get(request.function.__name__)) is not None:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        """What is tested, as YAML would say it; the one thing that a subclass must write."""
        raise NotImplementedError(f"{cls.__name__} needs a fixture `config`, of scope class")

    def skip_unless(self, condition: object, reason: str) -> None:
        """Skip the running test: the plugin does not declare what it is about. `reason` says what that is."""
        if not condition:
            pytest.skip(reason)
