"""Set the one version of all distributions: `python scripts/bump.py 0.2.0` (or `make bump VERSION=0.2.0`).

Writes it into every pyproject.toml and `nanovllm.__version__`, the range that a plugin of version N promises to run
with (core N and N+1) into every requirement on ours, and turns the changelog's `Unreleased` into the version and the
day. Checks everything first, and writes all or nothing. Knows no git: what it changed is yours to look at and commit.
"""

from __future__ import annotations

import argparse
import re
import sys
from datetime import date
from pathlib import Path

from packaging.version import Version

REPO = Path(__file__).resolve().parents[1]
RELEASE = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){2}")  # pip reads 0.2.0.dev1 as less than 0.2
VERSION = re.compile(r'^(version|__version__) = "([^"]+)"$', re.MULTILINE)
PIN = re.compile(r"\b(nanovllm(?:-[a-z]+)*(?:\[[a-z,-]+\])?)>=\d+\.\d+,<\d+\.\d+")
UNRELEASED = "## [Unreleased]"
SECTION = re.compile(r"^## \[([^]]+)\].*$", re.MULTILINE)


class Refused(Exception):
    """One sentence."""


def bumped(root: Path, version: str, today: date) -> dict[Path, str]:
    """The files that change, with their new text. Raises Refused."""
    if not RELEASE.fullmatch(version):
        raise Refused(f"{version!r} is no release such as 0.2.0: a version of another form does not satisfy `>=0.2`")
    projects = [root / "pyproject.toml", *sorted(root.glob("plugins/*/pyproject.toml"))]
    versioned = [*projects, root / "core" / "nanovllm" / "__init__.py"]
    pinned = [*projects, *sorted(root.glob("examples/*/pyproject.toml")), *sorted(root.glob("docs/**/*.md"))]
    changelog = root / "CHANGELOG.md"
    old = {path: path.read_text(encoding="utf-8") for path in {*versioned, *pinned, changelog}}

    stated = {path: [found[2] for found in VERSION.finditer(old[path])] for path in versioned}
    for path, found in stated.items():
        if len(found) != 1:
            raise Refused(f"{path.relative_to(root)} states {len(found)} versions, not one")
    if len(present := {found[0] for found in stated.values()}) > 1:
        raise Refused(f"the distributions have several versions: {', '.join(sorted(present))}")
    highest = Version(present.pop())
    if Version(version) < highest:
        raise Refused(f"{version} goes back: the tree is at {highest}")

    sections = list(SECTION.finditer(old[changelog]))
    if not sections or sections[0][1] != "Unreleased":
        raise Refused(f"CHANGELOG.md does not begin with `{UNRELEASED}`")
    if version in (released := [section[1] for section in sections[1:]]):
        raise Refused(f"{version} is released: CHANGELOG.md has a section of it")
    if released and Version(version) < Version(released[0]):
        raise Refused(f"{version} goes back: {released[0]} is released")
    end = sections[1].start() if len(sections) > 1 else len(old[changelog])
    if not re.search(r"^- \S", old[changelog][sections[0].end() : end], re.MULTILINE):
        raise Refused(f"`{UNRELEASED}` of CHANGELOG.md is empty: say what is new")

    major, minor, _ = version.split(".")
    new = dict(old)
    for path in versioned:
        new[path] = VERSION.sub(rf'\1 = "{version}"', new[path])
    for path in pinned:
        new[path] = PIN.sub(rf"\1>={major}.{minor},<{major}.{int(minor) + 2}", new[path])
    new[changelog] = old[changelog].replace(UNRELEASED, f"{UNRELEASED}\n\n## [{version}] - {today}", 1)
    return {path: text for path, text in new.items() if text != old[path]}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="for example 0.2.0")
    version = parser.parse_args(arguments).version
    try:
        files = bumped(REPO, version, date.today())
    except Refused as e:
        sys.exit(f"error: {e}")
    for path, text in sorted(files.items()):
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(REPO))
    print(f"next: git diff; make all build; git commit -am 'Release {version}'; git tag v{version}")


if __name__ == "__main__":
    main(sys.argv[1:])
