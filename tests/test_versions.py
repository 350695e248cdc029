"""The promise that core N runs plugins written for N and N - 1: what checks it, and the ranges that allow it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from nanovllm import __version__, hookspecs
from nanovllm.errors import PluginError
from nanovllm.loader import Plugins, load_object
from nanovllm.plugins import find
from site_of_fakes import Install, fake_site
from support import REPO

PLUGIN = """
from nanovllm.hookspecs import hookimpl

class Plugin:
    api_version = {version}

    @hookimpl
    def create_{kind}(self, ctx):
        return None

plugin = Plugin()
"""
NOW = Version(__version__)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from fake_site(tmp_path / "site", monkeypatch)


@pytest.mark.parametrize("kind", ["runner", "tokenizer", "sampler"])
@pytest.mark.parametrize(
    ("version", "upgrade"), [(6, "nanovllm"), (5, None), (4, None), (3, "acme"), (1, "acme")], ids=str
)
def test_a_core_runs_plugins_of_its_interface_and_the_one_before(
    install: Install, monkeypatch: pytest.MonkeyPatch, kind: str, version: int, upgrade: str | None
) -> None:
    monkeypatch.setattr(hookspecs, "API_VERSION", 5)
    install("acme", {f"nanovllm.{kind}s": "acme = acme_x:plugin"}, acme_x=PLUGIN.format(version=version, kind=kind))
    if upgrade is None:
        assert Plugins().load(f"{kind}s", "acme").plugin.api_version == version
        return
    with pytest.raises(PluginError) as refused:
        Plugins().load(f"{kind}s", "acme")
    assert str(refused.value) == (
        f"plugin {kind}s:acme@acme was written for plugin API {version}, and nanovllm {__version__} runs those for "
        f"4 and 5; try: pip install --upgrade {upgrade}"
    )


def test_a_first_interface_has_none_before_it(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hookspecs, "API_VERSION", 1)
    install("acme", {"nanovllm.runners": "acme = acme_x:plugin"}, acme_x=PLUGIN.format(version=0, kind="runner"))
    with pytest.raises(PluginError, match="runs those for 1; try: pip install --upgrade acme"):
        Plugins().load("runners", "acme")


@pytest.mark.parametrize("group", ["runners", "models", "commands", "conformance"])
def test_a_range_without_this_core_is_refused_before_the_import(install: Install, group: str) -> None:
    """Whatever is loaded, also what has no `api_version`: pip only warns."""
    install("acme", {f"nanovllm.{group}": "acme = acme_x:plugin"}, requires="nanovllm>=0.0.1,<0.0.2", acme_x="1 / 0")
    said = r"acme 1.0 needs nanovllm<0.0.2,>=0.0.1, but nanovllm .* try: pip install --upgrade nanovllm acme"
    with pytest.raises(PluginError, match=said):
        Plugins().load(group, "acme") if group == "runners" else load_object(find(group, "acme"))


# ------------------------------------------------------------------------------------------------ pins

TEXTS = [
    *REPO.glob("pyproject.toml"),
    *REPO.glob("plugins/*/pyproject.toml"),
    *REPO.glob("examples/*/pyproject.toml"),
    REPO / "docs" / "plugins.md",
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(REPO)))
def test_every_range_allows_what_is_promised_and_no_more(path: Path) -> None:
    """A plugin released with core 0.N works with 0.N and with 0.N + 1, whose interface may be the next."""
    ranges = [
        Requirement(r)
        for r in re.findall(r'"(nanovllm(?:-[a-z]+)*(?:\[[a-z,-]+\])?[<>=][^"]*)"', path.read_text("utf-8"))
    ]
    assert ranges, "it names no range of nanovllm"
    for wanted in ranges:
        allowed = {minor for minor in range(NOW.minor + 4) if wanted.specifier.contains(f"{NOW.major}.{minor}.1")}
        assert allowed == {NOW.minor, NOW.minor + 1}, str(wanted)


def test_the_page_says_the_promise() -> None:
    page = (REPO / "docs" / "plugins.md").read_text("utf-8")
    assert f"The interface is at version {hookspecs.API_VERSION}" in page
    assert "version N of the interface runs plugins written for N and for N − 1" in page
