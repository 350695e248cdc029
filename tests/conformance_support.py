"""What the tests of the conformance suites share: running a suite here, and reading its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanovllm.testing.fresh import Fresh
from nanovllm.testing.hygiene import Hygiene
from nanovllm.testing.run import Result, run
from nanovllm.testing.suite import Conformance

MADE = Fresh(problem=None, exit_code=None, extensions=(), api_version=1, printed="")  # nothing to say of the child


def results(
    suite: type[Conformance], config: Mapping[str, Any] | None = None, seen: Fresh | None = None
) -> dict[str, Result]:
    """Test name -> what became of it."""
    found = run(suite, config, seen)
    assert found, "the suite has no tests"
    assert len({r.name for r in found}) == len(found), "a test is there twice"
    return {r.name: r for r in found}


def outcomes(suite: type[Conformance], config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Test name -> passed, failed, skipped or xfailed."""
    return {name: result.outcome for name, result in results(suite, config).items()}


def failures(
    suite: type[Conformance], config: Mapping[str, Any] | None = None, seen: Fresh | None = None
) -> dict[str, str]:
    """Test name -> the sentence, for those that failed."""
    return failed(results(suite, config, seen))


def of(
    suite: type[Hygiene], make: Callable[[], Any], config: Mapping[str, Any] | None = None, only: str | None = None
) -> dict[str, Result]:
    """Test name -> what became of it, for a thing that no entry point names; without the child process."""

    def made(cls: type[Hygiene], config: Mapping[str, Any]) -> Any:
        return make()

    others = [n for n in dir(suite) if n.startswith("test_") and n != only] if only is not None else []
    members: dict[str, Any] = dict.fromkeys(others) | {"make": classmethod(made)}
    return results(type("Made", (suite,), members), config or {}, MADE)


def failed(found: Mapping[str, Result]) -> dict[str, str]:
    return {name: result.reason for name, result in found.items() if result.outcome == "failed"}
