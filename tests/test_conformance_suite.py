"""What all conformance suites share: levels, expected failures, hygiene in a child, running from a program."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nanovllm.testing
from conformance_support import results
from nanovllm.errors import PluginError
from nanovllm.plugins import discover
from nanovllm.testing import suite_for
from nanovllm.testing.fresh import fresh
from nanovllm.testing.hygiene import Hygiene
from nanovllm.testing.run import run, run_in_child
from nanovllm.testing.suite import LEVELS, Conformance, level
from site_of_fakes import Install, fake_site

GROUPS = ["models", "runners", "samplers", "tokenizers"]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from fake_site(tmp_path / "site", monkeypatch)


class Suite(Conformance):
    @level("basic")
    def test_good(self) -> None:
        assert True

    @level("robust")
    def test_bad(self) -> None:
        assert 1 + 1 == 3, "one and one are not three"

    @level("robust")
    def test_skipped(self) -> None:
        self.skip_unless(False, "it declares nothing of the kind")

    @level("fast")
    def test_note(self, record_property: Any) -> None:
        record_property("note", "2 times the speed of light")


# ------------------------------------------------------------------------------------- running a suite


def test_a_program_gets_one_result_per_test() -> None:
    found = results(Suite)
    assert [(r.name, r.level, r.outcome, r.reason) for r in found.values()] == [
        ("test_good", "basic", "passed", ""),
        ("test_bad", "robust", "failed", "one and one are not three"),
        ("test_skipped", "robust", "skipped", "it declares nothing of the kind"),
        ("test_note", "fast", "passed", ""),
    ]
    assert found["test_note"].notes == ("2 times the speed of light",)
    assert "assert (1 + 1) == 3" in found["test_bad"].details


def test_a_failure_of_a_fixture_is_a_failure_of_its_test() -> None:
    class Broken(Suite):
        @pytest.fixture
        def before(self) -> None:
            raise LookupError("nothing there")

        @pytest.fixture
        def after(self) -> Iterator[None]:
            yield
            raise LookupError("not given back")

        @level("basic")
        def test_setup(self, before: None) -> None:
            assert True

        @level("basic")
        def test_teardown(self, after: None) -> None:
            assert True

    found = results(Broken)
    assert (found["test_setup"].outcome, found["test_setup"].reason) == ("failed", "LookupError: nothing there")
    assert (found["test_teardown"].outcome, found["test_teardown"].reason) == ("failed", "LookupError: not given back")


def test_whoever_runs_it_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a conftest nor the settings of the directory, nor the command line of the pytest around it."""
    (tmp_path / "conftest.py").write_text("1/0")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --nonsense\n")
    monkeypatch.chdir(tmp_path)
    assert results(Suite)["test_good"].outcome == "passed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["conftest.py", "pytest.ini"]


def test_a_config_becomes_the_fixture() -> None:
    class Says(Conformance):
        @level("basic")
        def test_it(self, config: Any) -> None:
            raise AssertionError(f"it is {config}")

    assert results(Says, {"a": 1})["test_it"].reason == "it is {'a': 1}"
    assert "Says needs a fixture `config`" in _only(run(type("Says", (Says,), {}))).reason.replace("TestPlugin", "Says")


def _only(found: list[Any]) -> Any:
    [one] = found
    return one


# ----------------------------------------------------------------------------------- expected failures


def test_an_expected_failure_is_none_and_one_that_passes_is() -> None:
    class Excused(Suite):
        expected_failures = {"test_bad": "arithmetic is different here", "test_good": "it was broken once"}  # noqa: RUF012

    found = results(Excused)
    assert (found["test_bad"].outcome, found["test_bad"].reason) == ("xfailed", "arithmetic is different here")
    assert found["test_good"].outcome == "failed"
    assert found["test_good"].reason == "it passes, and is expected to fail: it was broken once"
    assert results(Suite)["test_bad"].outcome == "failed", "the base class is as it was"
    assert results(type("Inherits", (Excused,), {}))["test_bad"].outcome == "xfailed"


@pytest.mark.parametrize(
    ("expected", "why"),
    [
        ({"test_bda": "a reason"}, "names 'test_bda', which is none of its tests"),
        ({"skip_unless": "a reason"}, "names 'skip_unless', which is none of its tests"),
        ({"test_bad": ""}, r"\['test_bad'\] needs a reason"),
        ({"test_bad": "  "}, r"\['test_bad'\] needs a reason"),
        ({"test_bad": None}, r"\['test_bad'\] needs a reason"),
    ],
)
def test_an_expected_failure_without_test_or_reason_is_refused(expected: dict[str, Any], why: str) -> None:
    with pytest.raises(TypeError, match=f"Mine.expected_failures.*{why}"):
        type("Mine", (Suite,), {"expected_failures": expected})


def test_there_are_no_other_levels() -> None:
    with pytest.raises(AssertionError, match="there is no level 'paranoid'; the levels are basic, batched"):
        level("paranoid")


# ----------------------------------------------------------------------------- what every suite keeps


@pytest.mark.parametrize("group", GROUPS)
def test_every_test_has_a_level_and_says_what_it_found(group: str) -> None:
    """A command prints the first line of a failure: an assertion without a message would be an empty one."""
    suite = suite_for(group)
    tests = {name: test for name, test in inspect.getmembers(suite, callable) if name.startswith("test_")}
    assert len(tests) > 15
    assert {getattr(test, "level", None) for test in tests.values()} <= set(LEVELS)
    modules = {sys.modules[base.__module__] for base in suite.__mro__ if issubclass(base, Conformance)}
    for module in modules:
        for function in ast.walk(ast.parse(Path(str(module.__file__)).read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef) and function.name in tests:
                silent = [n for n in ast.walk(function) if isinstance(n, ast.Assert) and n.msg is None]
                # What only tells the type checker what a skip or a fixture has made sure may be silent.
                found = [n.lineno for n in silent if not re.search(r"^isinstance\(| is not None$", ast.unparse(n.test))]
                assert not found, f"{module.__file__}:{found}"


def test_the_suites_are_entry_points() -> None:
    assert [f.name for f in discover("conformance")] == GROUPS
    assert {n for n in nanovllm.testing.__all__ if n.endswith("Conformance")} == {
        suite_for(group).__name__ for group in GROUPS
    }
    for name in nanovllm.testing.__all__:
        assert name in dir(nanovllm.testing)
        assert getattr(nanovllm.testing, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'RunnerConformity'"):
        _ = nanovllm.testing.RunnerConformity


def test_importing_the_kit_imports_no_pytest() -> None:
    program = "import sys, nanovllm.testing; print([m for m in ('pytest', 'hypothesis', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("missing", ["pytest", "hypothesis"])
def test_a_missing_extra_is_one_sentence(missing: str) -> None:
    program = f"import sys; sys.modules['{missing}'] = None\nfrom nanovllm.testing import TokenizerConformance"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    last = done.stderr.strip().rpartition("\n")[2]
    assert last == (
        f"nanovllm.errors.PluginError: the conformance suites need {missing}, which is not installed; "
        "try: pip install 'nanovllm[testing]'"
    )


def test_a_suite_that_nobody_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanovllm.plugins, "discover", lambda group: [])
    with pytest.raises(PluginError, match=r"no conformance suite named 'models' .* pip install 'nanovllm-models'"):
        suite_for("models")


# ------------------------------------------------------------------------------------------- hygiene

TOKENIZER = """
import {imports}
from nanovllm.hookspecs import hookimpl

class Plugin:
    api_version = 1

    @hookimpl
    def create_tokenizer(self, ctx):
        from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
        {making}
        return SimpleBPETokenizer()

plugin = Plugin()
"""


def tokenizer(install: Install, making: str = "pass", imports: str = "sys") -> dict[str, Any]:
    source = TOKENIZER.format(making=making, imports=imports)
    install("acme", {"nanovllm.tokenizers": "acme = acme_tok:plugin"}, acme_tok=source)
    return {"tokenizer": "acme"}


class Kept(Hygiene):
    group = "tokenizers"
    startup_seconds = 30

    @level("basic")
    def test_what_needs_it(self, makeable: None) -> None:
        assert True


def hygiene(config: dict[str, Any], suite: type[Hygiene] = Kept) -> dict[str, tuple[str, str]]:
    found = results(suite, config)
    return {name: (r.outcome, r.reason) for name, r in found.items()}


def test_a_plugin_that_keeps_all_of_it(install: Install) -> None:
    assert {outcome for outcome, _ in hygiene(tokenizer(install)).values()} == {"passed"}


def test_one_that_hangs_in_its_constructor_is_one_failure(install: Install) -> None:
    config = tokenizer(install, "import time, subprocess, sys; subprocess.Popen(['sleep', '600']); time.sleep(600)")
    found = hygiene(config, type("Kept", (Kept,), {"startup_seconds": 6}))
    assert found["test_it_is_made"] == ("failed", "making it did not end within 6 seconds")
    assert found["test_what_needs_it"] == ("skipped", "it could not be made")


@pytest.mark.parametrize(
    ("making", "why"),
    [
        ("raise ValueError('no such layer')", "failed in create_tokenizer: ValueError: no such layer"),
        ("import os; os._exit(7)", "making it ended the process with status 7"),
        ("return None", "create_tokenizer returned a NoneType, not a tokenizer with vocab_size"),
    ],
)
def test_one_that_cannot_be_made_says_why(install: Install, making: str, why: str) -> None:
    found = hygiene(tokenizer(install, making))
    assert found["test_it_is_made"][0] == "failed"
    assert why in found["test_it_is_made"][1]
    assert found["test_what_needs_it"][0] == "skipped"


def test_one_that_prints_is_caught(install: Install) -> None:
    config = tokenizer(install, "import os; os.write(1, b'loading...')")
    [outcome, why] = hygiene(config)["test_it_leaves_stdout_alone"]
    assert (outcome, why) == ("failed", "it wrote to stdout, which belongs to the answers: 'loading...'")


def test_one_that_imports_a_runtime_at_load_is_caught(install: Install) -> None:
    pytest.importorskip("tokenizers")
    [outcome, why] = hygiene(tokenizer(install, imports="tokenizers"))["test_importing_it_loads_no_runtime"]
    assert outcome == "failed"
    assert why.startswith("importing it loads compiled libraries (tokenizers)")


def test_a_child_says_how_far_it_came(install: Install) -> None:
    seen = fresh("tokenizers", tokenizer(install, "raise LookupError"), 30)
    assert (seen.exit_code, seen.api_version, seen.extensions) == (3, 1, ())
    broken = fresh("tokenizers", {"tokenizer": "nobodys"}, 30)
    assert (broken.exit_code, broken.extensions) == (3, None)
    good = fresh("tokenizers", {"tokenizer": "simple"}, 30)
    assert (good.problem, good.exit_code, good.printed) == (None, None, "")


def test_a_test_in_which_the_child_dies_has_failed(install: Install) -> None:
    """What came before it counts, and what comes after it did not run."""
    config = tokenizer(install, "SimpleBPETokenizer.encode = lambda *a, **k: sys.modules['os']._exit(9)")
    found = run_in_child("tokenizers", config, fresh("tokenizers", config, 30), 60)
    assert found[-1].outcome == "failed"
    assert found[-1].reason == "it ended the process with status 9"
    assert {r.outcome for r in found[:-1]} == {"passed"}
    assert len(found) > 3
