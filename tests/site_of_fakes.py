"""Fake installed distributions: metadata, entry points and modules in a directory of their own on sys.path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

Install = Callable[..., None]


def fake_site(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """The body of a fixture; yields install("acme", {"nanovllm.runners": "x = acme_x:plugin"}, acme_x="source")."""
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)

    def install(
        name: str,
        entry_points: Mapping[str, str],  # group -> lines
        /,
        *,
        requires: str = "nanovllm>=0.1",
        version: str = "1.0",
        **modules: str,
    ) -> None:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: made by {name}\n"
        (info / "METADATA").write_text(f"{head}Requires-Dist: {requires}\n")
        groups = "".join(f"[{group}]\n{lines}\n" for group, lines in entry_points.items())
        (info / "entry_points.txt").write_text(groups)
        (info / "RECORD").write_text("")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
        importlib.invalidate_caches()

    yield install
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(site)):
            del sys.modules[name]
