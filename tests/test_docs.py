"""The documentation is run: every example of every page, every link, every make target it names.

In a page, a fenced block is run by its language; all of a page run in order, in one empty directory:

    python    in a fresh namespace; a `text` block right after it is what it must print
    console   its `$ nanovllm ...` lines, in this process; lines below one are what it must print. It must succeed,
              unless that begins with `error:` or the line ends in `# exit status N`
    yaml      a configuration, checked with the options of the plugins it names. A first line
              `# app.yaml` leaves it in the directory under that name, for later blocks

`<!-- continues -->` above a python block runs it in the namespace of the python block before it.
In expected output `...` stands for anything inside its line, and alone on a line for any lines; blank lines and
the width of gaps do not count. `<!-- no-run: reason -->` above a block leaves it alone.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import signal
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from nanovllm.cli import cli
from support import REPO

SECONDS = 120  # for one example
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("plugins/*/README.md")])
FENCE = re.compile(
    r"(?:<!-- (?:no-run: (?P<reason>.+?)|(?P<continues>continues)) -->\n)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```$(?P<after>\n*)",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    line: int
    language: str
    body: str
    expected: str | None  # of a python block
    continues: bool  # a python block, in the namespace of the one before


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    out = []
    for block, following in zip_longest(found, found[1:]):
        if block["reason"]:
            continue
        prints = following is not None and following["language"] == "text" and following.start() == block.end()
        line = text.count("\n", 0, block.start("body"))
        expected = following["body"] if prints else None
        out.append(Block(line, block["language"], block["body"], expected, block["continues"] is not None))
    return out


def shows(expected: str, printed: str) -> bool:
    """Is `printed` what a page shows? An ellipsis inside a line never reaches into the next one."""

    def lines(text: str) -> list[str]:
        return [" ".join(line.split()) for line in text.splitlines() if line.strip()]

    pattern = "".join(
        r"(?:[^\n]*\n)*?" if line == "..." else r"[^\n]*".join(map(re.escape, line.split("..."))) + r"\n"
        for line in lines(expected)
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines(printed))) is not None


def test_the_comparison_is_not_fooled() -> None:
    printed = "Answer: 2 + 3 = 4.\n\nStats: Prefill   53 tok/s\n"
    assert shows("Answer: ...4...\n...\n", printed)
    assert shows("...\nStats: Prefill ... tok/s\n", printed)
    assert shows("Answer: 2 + 3 = 4.\nStats: Prefill 53 tok/s\n", printed)
    assert not shows("Answer: ...5...\n...\n", printed), "the 5 is in another line"
    assert not shows("Answer: ...4...\n", printed), "a line is missing"
    assert not shows("...\nError: ...\n", printed)


def names(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=names)
def test_every_example_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("MODEL_PATH", "TOKENIZER_PATH"):
        monkeypatch.delenv(variable, raising=False)
    namespace: dict[str, object] = {}
    for block in blocks(page):
        where = f"{names(page)}, line {block.line}"
        with time_limit(where):
            if block.language == "python":
                if not block.continues:
                    namespace = {"__name__": "__main__"}
                run_python(block, where, namespace)
            elif block.language in ("console", "bash"):
                run_console(block, where)
            elif block.language == "yaml":
                check_yaml(block, where)


@contextlib.contextmanager
def time_limit(where: str) -> Iterator[None]:
    """An example that waits for ever fails, where the system can interrupt it."""

    def late(number: int, frame: object) -> None:
        pytest.fail(f"{where} was not done after {SECONDS} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_python(block: Block, where: str, namespace: dict[str, object]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        # Line numbers in a traceback are those of the page.
        exec(compile("\n" * block.line + block.body, where, "exec"), namespace)
    if block.expected is not None:
        assert shows(block.expected, printed.getvalue()), f"{where} printed:\n{printed.getvalue()}"


def run_console(block: Block, where: str) -> None:
    for command, expected in commands(block):
        words = shlex.split(command, comments=True)
        env = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            env[name] = value
        if words[:1] != ["nanovllm"]:
            continue
        assert words[1:2] not in (["serve"], ["runner-serve"]), f"{where}: {command} would never end; mark it no-run"
        result = CliRunner().invoke(cli, words[1:], env=env, prog_name="nanovllm")
        said = re.search(r"# exit status (\d+)$", command)
        is_refusal = expected.lstrip().startswith("error:")
        is_expected = result.exit_code == int(said[1]) if said else (result.exit_code != 0) == is_refusal
        assert is_expected, f"{where}: {command}\n{result.output}\n{result.exception!r}"
        if expected.strip():
            assert shows(expected, result.output), f"{where}: {command} printed:\n{result.output}"


def commands(block: Block) -> list[tuple[str, str]]:
    """(command, the output shown below it)."""
    body = block.body.replace("\\\n", " ")
    if block.language == "bash":  # commands only
        return [(line, "") for line in body.splitlines() if line.strip()]
    out: list[tuple[str, str]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            out.append((line[2:], ""))
        else:
            assert out, f"a console block begins with its output: {line}"
            out[-1] = (out[-1][0], out[-1][1] + line + "\n")
    return out


def check_yaml(block: Block, where: str) -> None:
    name = re.match(r"# ([\w.-]+\.ya?ml)\n", block.body)
    path = Path(name[1] if name else "example.yaml")
    path.write_text(block.body, encoding="utf-8")
    result = CliRunner().invoke(cli, ["config", "check", str(path)], prog_name="nanovllm")
    assert result.exit_code == 0, f"{where}: {result.output}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        aim = (page.parent / file).resolve() if file else page
        assert aim.exists(), f"{names(page)} links to {target}"
        if anchor:
            assert anchor in anchors(aim), f"{names(page)} links to {target}, which has no such heading"


def anchors(page: Path) -> set[str]:
    """The headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_every_page_of_docs_is_in_the_index() -> None:
    index = (REPO / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {p.relative_to(REPO / "docs").as_posix() for p in (REPO / "docs").glob("**/*.md")} - {"index.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_every_file_of_the_core_is_in_the_architecture() -> None:
    core = REPO / "core" / "nanovllm"
    files = {p.name for p in core.glob("*.py")} | {f"{p.parent.name}/" for p in core.glob("*/__init__.py")}
    text = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z_]+(?:\.py|/))` \|", text, re.MULTILINE)) >= files


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        (names(page), target)
        for page in PAGES
        for target in re.findall(r"(?:`|^|\$ )make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) > 3
    assert {(page, target) for page, target in named if target not in targets} == set()
