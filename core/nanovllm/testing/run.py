"""Running a suite from a program: in this process, or for `nanovllm plugins test` in a child.

This file knows no kind of plugin.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..child import run_child
from ..errors import NanoVLLMError
from . import suite_for
from .fresh import Fresh
from .suite import LEVELS, Conformance


@dataclass(frozen=True, slots=True)
class Result:
    """One test of a suite."""

    name: str
    level: str  # one of LEVELS
    outcome: str  # passed, failed, skipped; or xfailed: it failed as its class expects
    reason: str  # one sentence; "" where it passed
    notes: tuple[str, ...] = ()  # what it measured
    details: str = ""  # pytest's own account of a failure


def run_in_child(group: str, config: Mapping[str, Any], seen: Fresh, seconds: float) -> list[Result]:
    """Run the suite for the group in a child process, which is killed after that time.

    `seen`: what making it did. A test in which the child hangs or dies has failed; those after it did not run.
    """
    ended = run_child("nanovllm.testing.run", [group, dict(config), asdict(seen)], seconds)
    results: dict[str, Result] = {}  # in the order of running
    for line in ended.report.splitlines():
        values = json.loads(line)
        results[values["name"]] = Result(**values | {"notes": tuple(values.get("notes", ()))})
    if not results:
        raise NanoVLLMError(f"the conformance tests {ended.in_words(seconds)}")
    return [r if r.outcome else _replaced(r, f"it {ended.in_words(seconds)}") for r in results.values()]


def run(
    suite: type[Conformance],
    config: Mapping[str, Any] | None = None,
    seen: Fresh | None = None,
    tell: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run every test of the suite here; `config` and `seen`, where given, become its fixtures `config` and `fresh`.

    `tell` gets each Result, and before the test one without an outcome.
    """
    fixtures = {"config": config, "fresh": seen}
    members = {name: _fixture(name, value) for name, value in fixtures.items() if value is not None}
    recorder = _Recorder(type("TestPlugin", (suite,), {"__module__": __name__, **members}), tell)
    # An empty directory: no configuration, conftest or cache of whoever calls has a say.
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()) as output:
        Path(directory, "pytest.ini").write_text("[pytest]\n")
        Path(directory, "test_plugin.py").touch()
        without = [f"-pno:{plugin}" for plugin in ("cacheprovider", "faulthandler", "doctest")]
        status = pytest.main([f"--rootdir={directory}", "-q", *without, f"{directory}/test_plugin.py"], [recorder])
    assert status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), f"pytest: {output.getvalue()}"
    return recorder.results


def _fixture(name: str, value: Any) -> Any:
    def fixture(cls: type[Conformance]) -> Any:
        return value

    return pytest.fixture(scope="class", name=name)(classmethod(fixture))  # type: ignore[arg-type]


class _Recorder:
    """A pytest plugin: puts the class into the module that is collected, and keeps one Result per test."""

    def __init__(self, suite: type[Conformance], tell: Callable[[Result], None] | None) -> None:
        self.results: list[Result] = []
        self._suite = suite
        self._tell = tell or (lambda result: None)

    def pytest_pycollect_makemodule(self, module_path: Path, parent: pytest.Collector) -> pytest.Module:
        module: pytest.Module = pytest.Module.from_parent(parent, path=module_path)
        module.obj = ModuleType("test_plugin")
        module.obj.TestPlugin = self._suite
        return module

    def pytest_runtest_setup(self, item: pytest.Function) -> None:
        self._tell(Result(item.name, _level(item), "", ""))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo[None]) -> Any:
        report: pytest.TestReport = yield
        if report.when == "call" or report.outcome != "passed":  # a failing setup or teardown counts too
            result = _result(item, report)
            self.results = [r for r in self.results if r.name != result.name] + [result]
            self._tell(result)
        return report


def _level(item: pytest.Function) -> str:
    level: str = getattr(item.function, "level", LEVELS[0])
    return level


def _result(item: pytest.Function, report: pytest.TestReport) -> Result:
    outcome: str = report.outcome
    reason = ""
    if hasattr(report, "wasxfail"):
        outcome, reason = "xfailed", report.wasxfail
    elif report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
    elif report.failed:
        reason = _sentence(report)
    notes = tuple(str(value) for key, value in report.user_properties if key == "note")
    return Result(item.name, _level(item), outcome, reason, notes, report.longreprtext if report.failed else "")


def _sentence(report: pytest.TestReport) -> str:
    """The first line of what was raised; only foreign exceptions keep their type's name."""
    crash = getattr(report.longrepr, "reprcrash", None)
    message: str = crash.message if crash is not None else str(report.longrepr)
    first = message.strip().partition("\n")[0].replace("[XPASS(strict)]", "it passes, and is expected to fail:")
    return re.sub(r"^(AssertionError|Failed|nanovllm\.errors\.\w+): ", "", first)


def _replaced(begun: Result, reason: str) -> Result:
    return Result(begun.name, begun.level, "failed", reason)


def _main(report: Path) -> None:
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(report.parent)  # not where the user happens to be
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other people's pytest plugins have no say
    group, config, seen = json.load(sys.stdin)
    seen["extensions"] = tuple(seen["extensions"])  # it was imported
    with report.open("w", encoding="utf-8") as file:

        def tell(result: Result) -> None:
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()

        run(suite_for(group), config, Fresh(**seen), tell)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
