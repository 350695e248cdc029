"""scripts/bump.py in a copy of the tree: one version everywhere, or one sentence and nothing written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import REPO

CHANGELOG = """\
# Changelog

## [Unreleased]

### Added

- Something.

## [0.1.0] - 2026-01-02

- The beginning.
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the script reads, at version 0.1.0."""
    root = tmp_path / "tree"
    for pattern in (
        "pyproject.toml",
        "*/*/pyproject.toml",
        "core/nanovllm/__init__.py",
        "scripts/bump.py",
        "docs/**/*.md",
    ):
        for path in REPO.glob(pattern):
            copy = root / path.relative_to(REPO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    for path in (
        *root.glob("pyproject.toml"),
        *root.glob("plugins/*/pyproject.toml"),
        root / "core/nanovllm/__init__.py",
    ):
        replace(path, r'^(version|__version__) = ".*"$', r'\1 = "0.1.0"')
    (root / "CHANGELOG.md").write_text(CHANGELOG)
    return root


def replace(path: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert count == 1, path
    path.write_text(text, encoding="utf-8")


def texts(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in sorted(root.rglob("*")) if p.is_file()}


def bump(root: Path, version: str) -> subprocess.CompletedProcess[str]:
    script = root / "scripts" / "bump.py"
    return subprocess.run([sys.executable, str(script), version], capture_output=True, text=True, encoding="utf-8")


def test_one_version_and_one_promise_everywhere(tree: Path) -> None:
    before = texts(tree)
    done = bump(tree, "0.2.0")
    assert done.returncode == 0, done.stderr
    after = texts(tree)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == set(done.stdout.splitlines()[:-1])
    projects = [name for name in after if re.fullmatch(r"(plugins/\w+/)?pyproject\.toml", name)]
    assert len(projects) > 7
    for name in projects:
        assert re.findall(r'^version = "(.*)"$', after[name], re.MULTILINE) == ["0.2.0"]
    assert '__version__ = "0.2.0"' in after["core/nanovllm/__init__.py"]
    for name, text in after.items():
        if name.endswith((".toml", ".md")):
            ranges = set(re.findall(r"\bnanovllm(?:-[a-z]+)*>=([\d.]+,<[\d.]+)", text))
            assert ranges <= {"0.2,<0.4"}, name
    # Nothing else: with the old numbers put back, it is the old text.
    for name in changed - {"CHANGELOG.md"}:
        assert after[name].replace("0.2.0", "0.1.0").replace(">=0.2,<0.4", ">=0.1,<0.3") == before[name]
    assert re.search(r"^## \[Unreleased\]\n\n## \[0\.2\.0\] - \d{4}-\d\d-\d\d\n\n### Added\n\n- Something\.$",
                     after["CHANGELOG.md"], re.MULTILINE)  # fmt: skip
    assert after["CHANGELOG.md"].endswith(CHANGELOG[CHANGELOG.index("## [0.1.0]") :])


def test_a_repair_keeps_the_promise_and_a_tenth_minor_is_more_than_a_ninth(tree: Path) -> None:
    assert bump(tree, "0.1.1").returncode == 0
    assert '"nanovllm-tokenizers>=0.1,<0.3"' in (tree / "pyproject.toml").read_text()
    for version, range_ in (("0.9.0", "0.9,<0.11"), ("0.10.0", "0.10,<0.12"), ("1.0.0", "1.0,<1.2")):
        replace(tree / "CHANGELOG.md", r"^## \[Unreleased\]$", "## [Unreleased]\n\n- More.")
        done = bump(tree, version)
        assert done.returncode == 0, done.stderr
        assert f"nanovllm-tokenizers>={range_}" in (tree / "pyproject.toml").read_text()


def test_the_first_release_has_the_version_that_the_tree_has(tree: Path) -> None:
    (tree / "CHANGELOG.md").write_text(CHANGELOG[: CHANGELOG.index("## [0.1.0]")])
    done = bump(tree, "0.1.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "CHANGELOG.md"
    assert bump(tree, "0.1.0").returncode == 1, "it is released"


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("0.2", "no release"),
        ("0.2.0.dev0", "does not satisfy `>=0.2`"),
        ("0.2.0rc1", "no release"),
        ("0.2.0+dirty", "no release"),
        ("v0.2.0", "no release"),
        ("0.02.0", "no release"),
        ("0.٢.0", "no release"),
        ("0.1٢.0", "no release"),
        ("0.0.9", "0.0.9 goes back: the tree is at 0.1.0"),
        ("0.1.0", "0.1.0 is released"),
    ],
)
def test_a_version_that_cannot_be_is_refused(tree: Path, version: str, sentence: str) -> None:
    refused(tree, version, sentence)


def refused(tree: Path, version: str, sentence: str) -> None:
    before = texts(tree)
    done = bump(tree, version)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert texts(tree) == before


def test_a_tree_in_disorder_is_refused(tree: Path) -> None:
    log = tree / "CHANGELOG.md"
    for text, sentence in (
        (CHANGELOG.replace("- Something.\n", ""), "is empty"),
        (CHANGELOG.replace("## [Unreleased]", "## [0.2.0] - 2026-02-03"), "does not begin with"),
        ("# Changelog\n", "does not begin with"),
        (CHANGELOG.replace("0.1.0", "0.3.0"), "goes back: 0.3.0 is released"),
    ):
        log.write_text(text)
        refused(tree, "0.2.0", sentence)
    log.write_text(CHANGELOG)
    replace(tree / "plugins" / "models" / "pyproject.toml", '^version = "0.1.0"$', 'version = "0.1.1"')
    refused(tree, "0.2.0", "several versions: 0.1.0, 0.1.1")
    replace(tree / "plugins" / "models" / "pyproject.toml", '^version = "0.1.1"\n', "")
    refused(tree, "0.2.0", "plugins/models/pyproject.toml states 0 versions")


def test_the_changelog_of_this_tree_is_ready_to_be_released() -> None:
    headings = re.findall(r"^## (.*)$", (REPO / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
