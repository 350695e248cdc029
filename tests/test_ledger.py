"""The ledger tells no lies: every row of the requirements is in it, and whatever it names exists."""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from typing import NamedTuple

import pytest

from support import REPO, SPEC, needs_spec

LEDGER = REPO / "docs" / "ledger.md"
STATES = ("delivered", "partly", "not delivered")


class Row(NamedTuple):
    id: str
    subject: str
    issue: str  # "1 of 7", or several with commas
    state: str
    shown: str  # what shows it, or why it is not delivered

    @property
    def references(self) -> list[str]:
        """What is named in backticks and looks like a file, with or without `::name`."""
        return [r for r in re.findall(r"`([^`]+)`", self.shown) if "/" in r or (REPO / r).is_file()]


def rows() -> list[Row]:
    lines = [line for line in LEDGER.read_text(encoding="utf-8").splitlines() if re.match(r"\| [A-Z][\d-]", line)]
    return [Row(*(cell.strip() for cell in line[1:-1].split("|"))) for line in lines]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)
def test_a_row_says_who_delivers_it_and_what_shows_it(row: Row) -> None:
    assert row.state in STATES
    if row.state == "not delivered":
        assert row.shown.startswith("because ")
        return
    assert re.fullmatch(r"[1-7] of 7(, [1-7] of 7)*", row.issue)
    assert row.references, "nothing shows it"
    assert ("missing: " in row.shown) == (row.state == "partly"), "what is missing?"


@pytest.mark.parametrize("row", [r for r in rows() if r.references], ids=lambda row: row.id)
def test_what_a_row_names_exists(row: Row) -> None:
    for reference in row.references:
        file, _, name = reference.partition("::")
        assert (REPO / file).is_file(), f"{row.id} names {file}"
        if name:
            assert name in names_in(file), f"{row.id} names {reference}"


@lru_cache
def names_in(file: str) -> frozenset[str]:
    """What the top of a Python file defines: functions, classes, and `TestX = X.TestCase`."""
    tree = ast.parse((REPO / file).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = [node.name for node in tree.body if isinstance(node, kinds)]
    assigned = [
        t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    ]
    return frozenset(name for name in (*defined, *assigned) if name.lower().startswith("test"))


def test_whatever_else_the_ledger_names_exists() -> None:
    for file, name in re.findall(
        r"`((?:tests|plugins|docs|examples)/[^`:]+)(?:::([^`]+))?`", LEDGER.read_text("utf-8")
    ):
        assert (REPO / file).is_file(), file
        assert not name or name in names_in(file), f"{file}::{name}"


def test_no_row_is_listed_twice() -> None:
    ids = [row.id for row in rows()]
    assert sorted(ids) == sorted(set(ids))


@needs_spec
def test_the_rows_are_those_of_the_requirements() -> None:
    text = (SPEC / "seeds.md").read_text(encoding="utf-8")
    wanted = set(re.findall(r"^\| ([A-Z]\d*-?\d+) \|", text, re.MULTILINE))
    # The ancestors' defects stand in one paragraph: "D1 outputs assigned ... · D2 stale ...".
    wanted |= set(re.findall(r"(?:^|· |: )(D\d+) ", text, re.MULTILINE))
    assert len(wanted) > 150, "the requirements are written in another way than this test reads them"
    listed = {row.id for row in rows()}
    assert (wanted - listed, listed - wanted) == (set(), set())
