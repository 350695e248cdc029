"""The tutorials, followed word for word by somebody who has nothing but Python, pip and the page.

In the order of the page, in a virtual environment that knows nothing of this checkout, into which our distributions
come as wheels and everybody else's from the index:

    console   each `$ ` line is run; what the page shows below it is what it must print. It must succeed, unless a line
              that the page shows begins with `failed` or `error:`
    diff      the lines of a file with a minus become those with a plus; the others stand around them
    others    are a file, or a part of one

The first line of what concerns a file names it: `# FILE` alone, `# FILE, continued` to be added to its end, `# FILE,
instead of the raise` in the method that `plugins new` left to be written, `# FILE, after that` below it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support import REPO
from test_docs import shows
from wheels_support import Environment, attempt, call

TUTORIALS = REPO / "docs" / "tutorials"
BLOCK = re.compile(
    r"<!-- no-run: run word for word by tests/test_tutorial\.py -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


class Reader:
    """Somebody in a directory with a page, who does what it says."""

    def __init__(self, environment: Environment, directory: Path) -> None:
        self._environment = environment
        self.directory = directory
        self._last = ""  # what stands in the place of the raise
        directory.mkdir()

    def follow(self, page: Path) -> None:
        blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
        assert blocks, f"{page.name} has nothing to follow"
        for language, body in blocks:
            if language == "console":
                self._run(body)
                continue
            first, _, text = body.partition("\n")
            name = re.fullmatch(r"# ([\w./-]+?)(?:, (continued|instead of the raise|after that))?", first)
            assert name, f"{page.name}: a block names no file: {first}"
            file = self.directory / name[1]
            before = file.read_text(encoding="utf-8") if language == "diff" or name[2] else ""
            file.write_text(self._written(before, text, "diff" if language == "diff" else name[2]), encoding="utf-8")

    def _written(self, file: str, block: str, how: str | None) -> str:
        """The file with the block in it."""
        old, new = "", block
        if how == "diff":
            lines = [(line[:1], line[1:]) for line in block.splitlines()]
            old, new = ("\n".join(text for mark, text in lines if mark != other) + "\n" for other in "+-")
        elif how == "instead of the raise":
            [old] = re.findall(r"^ *# -+ FILL IN.*\n *raise NotImplementedError\(.*\n", file, re.MULTILINE)
            self._last = new
        elif how == "after that":
            old, new = self._last, self._last + block
            self._last = new
        else:
            return file + block
        assert file.count(old) == 1, f"there are {file.count(old)} places for:\n{block}"
        return file.replace(old, new)

    def _run(self, body: str) -> None:
        for command, shown in re.findall(r"^\$ ([^\n]*)\n((?:(?!\$ )[^\n]*\n)*)", body, re.MULTILINE):
            program, *arguments = shlex.split(command)
            if program == "cd":
                self.directory /= arguments[0]
            elif program == "pip":
                assert arguments.pop(0) == "install", command
                self._environment.home = self.directory
                self._environment.install(*arguments)
            else:
                is_failure = re.search(r"^(failed|error:) ", shown, re.MULTILINE) is not None
                done = attempt([str(self._environment.bin / program), *arguments], self.directory)
                printed = done.stdout + done.stderr
                assert (done.returncode != 0) == is_failure, f"{command} ended with {done.returncode}:\n{printed}"
                assert not shown.strip() or shows(shown, printed), f"{command} printed:\n{printed}"


@pytest.fixture(scope="module")
def reader(
    environment: Callable[[Path], Environment], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Reader]:
    """reader("runner"): somebody in an empty directory; all of them share one environment."""
    home = tmp_path_factory.mktemp("tutorials")
    shared = environment(home)
    return lambda name: Reader(shared, home / name)


def test_the_runner_tutorial_leads_to_a_passing_runner(reader: Callable[[str], Reader]) -> None:
    """And to the example in the repository, to the letter."""
    stranger = reader("runner")
    stranger.follow(TUTORIALS / "runner.md")
    example = REPO / "examples" / "runner_jax"
    files = ["pyproject.toml", *(p.relative_to(example).as_posix() for p in example.glob("*/*.py"))]
    assert len(files) == 5
    for file in files:
        ours, theirs = (directory / file for directory in (example, stranger.directory))
        assert theirs.read_text(encoding="utf-8") == ours.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("kind", ["tokenizer", "sampler"])
def test_the_tutorial_leads_to_a_passing_plugin(kind: str, reader: Callable[[str], Reader]) -> None:
    stranger = reader(kind)
    stranger.follow(TUTORIALS / f"{kind}.md")
    assert "NotImplementedError" not in next(stranger.directory.glob(f"nanovllm_*/{kind}.py")).read_text("utf-8")


def test_the_family_tutorial_leads_to_a_passing_family(reader: Callable[[str], Reader], tmp_path: Path) -> None:
    """And beside transformers, which the tutorial leaves to its reader and which is here, it passes one test more."""
    stranger = reader("family")
    stranger.follow(TUTORIALS / "family.md")
    pytest.importorskip("transformers")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(tmp_path)]
    call([sys.executable, "-m", "pip", "install", *options, str(stranger.directory)], tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "transformers", "-p", "no:cacheprovider"], cwd=stranger.directory,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert re.search(r"^1 passed, \d+ deselected", done.stdout, re.MULTILINE), done.stdout + done.stderr
