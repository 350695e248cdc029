"""The pages that scripts write are those that they would write now, and every public name has a docstring."""

from __future__ import annotations

import importlib
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

import nanovllm
from support import REPO


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "scripts"))


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("python_docs")


@pytest.mark.parametrize("name", ["api_docs", "commands_docs", "configuration_docs", "python_docs"])
def test_a_page_is_current(name: str) -> None:
    script = importlib.import_module(name)
    assert importlib.import_module("generated").part(script.PAGE) == script.markdown(), f"run scripts/{name}.py"


def test_every_public_name_has_an_entry_and_a_docstring(script: ModuleType) -> None:
    names = set(nanovllm.__all__) - {"__version__"}
    assert names <= script.ENTRIES
    assert {name for name in names if not getattr(nanovllm, name).__doc__} == set()


SOURCE = '''
from typing import ClassVar

class Example:
    """A class."""

    field: int | None = 3  # (S,) of it
    limit: ClassVar[float] = 0.5
    """How far."""

    @classmethod
    def built(cls, path: str, *, strict: bool = True, **more: object) -> "Example":
        """Made. Raises ConfigError."""

    @property
    def size(self) -> int: ...
'''


TABLE = r"""
| field | type | default |  |
| --- | --- | --- | --- |
| `field` | `int \| None` | `3` | (S,) of it |
| `limit` | `float` | `0.5` | How far. |
""".strip()


def test_an_entry_says_what_the_code_says(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nanovllm_example.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    from nanovllm_example import Example

    entry = script.entry("Example", Example, True)
    assert list(islice(entry, 7)) == [
        "### Example",
        "```py\nclass Example\n```",
        "A class.",
        TABLE,
        "#### Example.built",
        "```py\nExample.built(path: str, *, strict: bool = True, **more: object) -> 'Example'\n```",
        "Made. Raises [ConfigError](#configerror).",
    ]
    with pytest.raises(SystemExit, match=r"^Example\.size has no docstring$"):
        list(entry)
