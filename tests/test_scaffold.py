"""`nanovllm plugins new`: what it writes is installed, checked and tested; what it refuses leaves nothing behind."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import nanovllm
from nanovllm import scaffold
from nanovllm.cli import cli
from nanovllm.errors import ConfigError
from nanovllm.plugins import find
from nanovllm.scaffold import PACKAGES, Written, write_package
from support import REPO

TEMPLATES = REPO / "core" / "nanovllm" / "scaffold" / "templates"


class Author:
    """Somebody who let the scaffold write one package of each kind, as it comes and filled in, and installed them."""

    def __init__(self, home: Path) -> None:
        self.home, self.site = home, home / "site"
        self.packages: dict[tuple[str, bool], Written] = {}  # (kind, is it filled in)
        for kind in PACKAGES:
            for is_example in (False, True):
                name = f"{'filled' if is_example else 'blank'}-{kind}"
                self.packages[kind, is_example] = write_package(kind, name, home / name, is_example)
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(self.site)]
        done = self.run("-m", "pip", "install", *options, *(str(p.directory) for p in self.packages.values()))
        assert done.returncode == 0, done.stdout

    def run(self, *arguments: str, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
        # One thread: several of such processes, each with BLAS threads that spin, would stand in each other's way.
        settings = {"PYTHONPATH": str(self.site), "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=directory or self.home, env=os.environ | settings,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
        )  # fmt: skip

    def test(self, package: Written) -> subprocess.CompletedProcess[str]:
        """`nanovllm plugins test` of it, as its README says."""
        main = "from nanovllm.cli import main; main()"
        return self.run(
            "-W", "error", "-c", main, "plugins", "test", *package.tested.split(), directory=package.directory
        )


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> Author:
    return Author(tmp_path_factory.mktemp("author"))


# -------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", PACKAGES)
def test_filled_in_it_passes_its_suite(kind: str, author: Author) -> None:
    package = author.packages[kind, True]
    done = author.test(package)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^basic +[1-9]\d* +0 ", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("kind", PACKAGES)
def test_before_that_the_failures_name_the_method(kind: str, author: Author) -> None:
    """In the command's table and in the author's own pytest."""
    package = author.packages[kind, False]
    sentence = f"{package.method} is not written yet: fill it in, in nanovllm_blank_{kind}"
    done = author.test(package)
    assert done.returncode != 0
    assert sentence in done.stdout
    done = author.run("-W", "error", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", directory=package.directory)
    assert done.returncode == 1
    assert sentence in done.stdout


@pytest.mark.parametrize("kind", PACKAGES)
def test_only_the_method_is_left_to_write(kind: str, author: Author) -> None:
    """The two packages differ in the body of one function, and in what it imports."""

    def rest(package: Written, name: str) -> str:
        text = package.file.read_text(encoding="utf-8").replace(name, "NAME").replace(name.capitalize(), "NAME")
        tree = ast.parse(text)
        method = package.method.rpartition(".")[2]
        [body] = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == method]
        body.body, body.decorator_list = [], []
        tree.body = [n for n in tree.body if kind != "family" or not isinstance(n, ast.ImportFrom)]
        return ast.dump(tree)

    blank, filled = author.packages[kind, False], author.packages[kind, True]
    assert rest(blank, "blank") == rest(filled, "filled")
    assert blank.file.read_text(encoding="utf-8").count("NotImplementedError") == 1


def test_what_is_written_is_clean_and_typed(author: Author) -> None:
    directories = [str(p.directory) for p in author.packages.values()]
    for command in (["ruff", "check"], ["ruff", "format", "--check"]):
        done = author.run("-m", *command, "--no-cache", "--config", f"cache-dir='{author.home}'", *directories)
        assert done.returncode == 0, done.stdout
    done = author.run("-m", "mypy", "--strict", *(str(p.file.parent) for p in author.packages.values()))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", PACKAGES)
def test_the_distribution_says_what_it_is(kind: str, author: Author) -> None:
    package = author.packages[kind, True]
    [installed] = importlib.metadata.distributions(name=f"nanovllm-filled-{kind}", path=[str(author.site)])
    assert [e.group for e in installed.entry_points] == [f"nanovllm.{PACKAGES[kind].group}"]
    # The same range as that of our own plugins: this core and the next.
    ranges = [
        {str(r.specifier) for r in map(Requirement, lines or []) if r.name == "nanovllm"}
        for lines in (installed.requires, importlib.metadata.requires("nanovllm-models"))
    ]
    assert ranges[0] == ranges[1]
    major, minor = map(int, nanovllm.__version__.split(".")[:2])
    for later, is_taken in enumerate([True, True, False]):
        assert all(SpecifierSet(one).contains(f"{major}.{minor + later}.0") == is_taken for one in ranges[0])
    written = {p.relative_to(package.directory).as_posix() for p in package.directory.rglob("*") if p.is_file()}
    assert {"README.md", ".gitignore", ".github/workflows/test.yml", "tests/test_conformance.py"} <= written
    assert f"nanovllm_filled_{kind}/py.typed" in written
    assert not [p for p in written if "$" in (package.directory / p).read_text() and not p.endswith(".yml")]


def test_the_templates_are_in_the_wheel_and_are_no_files_of_ours(wheels: Path) -> None:
    [wheel] = wheels.glob("nanovllm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    templates = {p.relative_to(REPO / "core").as_posix() for p in TEMPLATES.rglob("*") if p.is_file()}
    assert templates <= names
    assert all(name.endswith(".template") for name in templates)


# ------------------------------------------------------------------------------------------- the command


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["plugins", "new", *arguments], prog_name="nanovllm")
    return result.exit_code, result.output


def test_the_command_says_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed = invoke("sampler", "nanovllm-acme_gpu")  # the prefix is not doubled
    assert status == 0, printed
    assert printed.splitlines() == [
        "wrote nanovllm-acme-gpu",
        f"write AcmeGpuSampler.draw in {Path('nanovllm-acme-gpu/nanovllm_acme_gpu/sampler.py')}, then:",
        "  cd nanovllm-acme-gpu",
        "  pip install -e '.[test]'",
        "  nanovllm plugins test numpy@nanovllm-acme-gpu",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["nanovllm-acme-gpu"]
    if os.name != "nt":
        assert (tmp_path / "nanovllm-acme-gpu").stat().st_mode & 0o777 == 0o755
    assert "write " not in invoke("family", "acme", "--example", "--directory", "elsewhere")[1]


REFUSED = {
    ("runner", "1st"): "'1st' cannot be the name of a runner; use at most 40 lower-case letters",
    ("runner", "Acme"): "'Acme' cannot be the name of a runner",
    ("runner", "a/../b"): "'a/../b' cannot be the name of a runner",
    ("runner", "a--b"): "'a--b' cannot be the name of a runner",
    ("runner", "é"): "'é' cannot be the name of a runner",
    ("runner", ""): "'' cannot be the name of a runner",
    ("family", "nanovllm-"): "'' cannot be the name of a model family",
    ("sampler", "x" * 41): f"'{'x' * 41}' cannot be the name of a sampler",
    ("runner", "on"): "'on' is no text in YAML, where a configuration names it; choose another name",
    ("runner", "mock"): "a runner named 'mock' is installed already, by nanovllm ",
    ("family", "llama"): "a model family named 'llama' is installed already, by nanovllm-models",
    (
        "tokenizer",
        "models",
    ): f"a distribution nanovllm-models {nanovllm.__version__} is installed already; choose another name",
}


@pytest.mark.parametrize(("kind", "name"), REFUSED, ids=lambda v: v or "empty")
def test_a_name_that_cannot_be_used_is_refused(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed = invoke(kind, name)
    assert status == 2
    assert printed.startswith(f"error: {REFUSED[kind, name]}")
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(ConfigError, match=r"there exists already; choose another --directory"):
        write_package("runner", "acme", tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"child cannot be written: .*; choose another --directory"):
        write_package("runner", "acme", tmp_path / "no" / "child")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("call", range(1, 9))
def test_a_failure_half_way_leaves_nothing(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th file cannot be written: no directory, and none of its hidden beginnings."""
    write, calls = Path.write_text, 0

    def fails(self: Path, *arguments: object, **options: object) -> int:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")
        return write(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(ConfigError, match="acme cannot be written: No space left on device"):
        write_package("runner", "acme", tmp_path / "acme")
    assert list(tmp_path.iterdir()) == []


def test_kinds_are_those_of_the_command() -> None:
    from nanovllm.cli.new import new

    assert list(new.params[0].type.choices) == list(PACKAGES)
    assert {package.group for package in PACKAGES.values()} == {"runners", "tokenizers", "samplers", "models"}
    assert all(find("conformance", package.group) for package in PACKAGES.values())
    assert scaffold.__doc__
