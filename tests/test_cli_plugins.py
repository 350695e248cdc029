"""The command line itself: listing, third-party commands, errors and exit statuses; `plugins` and `config`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

import nanovllm.plugins
from nanovllm import __version__, errors, schema
from nanovllm.cli import _COMMANDS, _PLUGIN_HELP, cli
from nanovllm.config import Config, leaves, load
from site_of_fakes import Install, fake_site

HELLO = """
import click

@click.command()
@click.argument("name")
def hello(name):
    click.echo(f"hello {name}")
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from fake_site(tmp_path / "site", monkeypatch)


def run(*arguments: str, **environment: str | None) -> Result:
    runner = CliRunner(env={"MODEL_PATH": None, "TOKENIZER_PATH": None, **environment})
    return runner.invoke(cli, list(arguments))


# ------------------------------------------------------------------------------------- the listing


def test_help_names_every_command_and_exit_status() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name, (_, text) in _COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", result.stdout, re.MULTILINE)
    statuses = set(map(int, re.findall(r"^    (\d+) ", result.stdout, re.MULTILINE)))
    raised = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.NanoVLLMError)}
    assert raised | {0, 130} == statuses


HELP = {name: text for name, (_, text) in _COMMANDS.items()} | _PLUGIN_HELP


@pytest.mark.parametrize("name", list(HELP))
def test_every_command_of_ours_has_that_help(name: str) -> None:
    if name in _PLUGIN_HELP:
        pytest.importorskip("nanovllm_models")
    result = run(name, "--help")
    assert result.exit_code == 0
    assert HELP[name] in result.stdout


def test_version() -> None:
    assert run("--version").stdout == f"nanovllm {__version__}\n"


def test_third_party_commands_are_listed_without_import_and_run(install: Install) -> None:
    install("acme", {"nanovllm.commands": "hello = acme_hello:hello"}, acme_hello=HELLO)
    assert re.search(r"^  hello +made by acme$", run("--help").stdout, re.MULTILINE)
    assert "acme_hello" not in sys.modules
    assert run("hello", "you").stdout == "hello you\n"
    assert "NAME" in run("hello", "--help").stdout


def test_a_broken_command_breaks_only_itself(install: Install) -> None:
    install("acme", {"nanovllm.commands": "boom = acme_boom:it\nodd = acme_odd:it"}, acme_boom="1/0", acme_odd="it = 3")
    assert run("--help").exit_code == 0
    result = run("boom")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.startswith("error: command 'boom' of acme 1.0 cannot be imported: ZeroDivisionError")
    assert "command 'odd' is a int, not a click command" in run("odd").stderr


def test_nobody_replaces_a_command_of_the_core(install: Install) -> None:
    install("acme", {"nanovllm.commands": "ask = acme_hello:hello"}, acme_hello=HELLO)
    assert "QUESTION" in run("ask", "--help").stdout
    assert "made by acme" not in run("--help").stdout


def test_commands_that_clash(install: Install) -> None:
    install("acme-a", {"nanovllm.commands": "hello = acme_hello:hello"}, acme_hello=HELLO)
    install("acme-b", {"nanovllm.commands": "hello = acme_other:hello"})
    result = run("hello", "you")
    assert result.exit_code == 3
    assert "write hello@acme-a to choose" in result.stderr
    assert run("hello@acme-a", "you").stdout == "hello you\n"


def test_commands_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("nope").exit_code == 2
    # Each of ours may be installed here.
    monkeypatch.setitem(nanovllm.plugins._OFFICIAL, ("commands", "levitate"), "nanovllm[levitation]")
    result = run("levitate")
    assert result.exit_code == 3
    assert result.stderr.endswith("try: pip install 'nanovllm[levitation]'\n")


# ------------------------------------------------------------------------------------------- errors


RAISES = """
import click
from nanovllm import errors

@click.command()
@click.argument("what")
def fail(what):
    raise {"interrupt": KeyboardInterrupt(), "bug": ZeroDivisionError("oops")}.get(what) or getattr(errors, what)("why")
"""


@pytest.mark.parametrize(
    ("what", "status", "stderr"),
    [
        ("ConfigError", 2, "error: why\n"),
        ("RequestError", 2, "error: why\n"),
        ("PluginError", 3, "error: why\n"),
        ("ModelError", 4, "error: why\n"),
        ("TokenizerError", 4, "error: why\n"),
        ("EngineDead", 5, "error: why\n"),
        ("bug", 1, "error: unexpected ZeroDivisionError: oops (run again with --debug for the traceback)\n"),
        ("interrupt", 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_a_status(install: Install, what: str, status: int, stderr: str) -> None:
    install("acme", {"nanovllm.commands": "fail = acme_fail:fail"}, acme_fail=RAISES)
    result = run("fail", what)
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", stderr)


def test_debug_lets_the_traceback_through(install: Install) -> None:
    install("acme", {"nanovllm.commands": "fail = acme_fail:fail"}, acme_fail=RAISES)
    assert isinstance(run("--debug", "fail", "bug").exception, ZeroDivisionError)
    assert isinstance(run("--debug", "fail", "ModelError").exception, errors.ModelError)


# ------------------------------------------------------------------------------------------ plugins


def test_plugins_list(install: Install) -> None:
    install("acme", {"nanovllm.runners": "boom = acme_boom:plugin"}, acme_boom="1/0")
    lines = [line.split() for line in run("plugins", "list").stdout.splitlines()]
    assert lines[0] == ["KIND", "NAME", "FROM"]
    assert ["runner", "boom", "acme", "1.0"] in lines
    assert ["runner", "mock", "nanovllm", __version__] in lines
    rows = json.loads(run("plugins", "list", "--json").stdout)
    assert {
        "kind": "runner",
        "name": "boom",
        "distribution": "acme",
        "version": "1.0",
        "value": "acme_boom:plugin",
    } in rows
    assert len(rows) == len(lines) - 1


def test_plugins_show() -> None:
    result = run("plugins", "show", "mock")
    assert result.exit_code == 0
    assert "hooks: create_runner, runner_config" in result.stdout
    assert "runner.seed: another seed, another model (default 0)" in result.stdout
    result = run("plugins", "show", "mokc")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "no plugin named 'mokc' is installed" in result.stderr


def test_plugins_show_of_a_broken_one_says_why_and_shows_the_others(install: Install) -> None:
    install("acme", {"nanovllm.runners": "mock = acme_boom:plugin"}, acme_boom="1/0")
    result = run("plugins", "show", "mock")
    assert result.exit_code == 3
    assert "error: runner 'mock' of acme 1.0 cannot be imported: ZeroDivisionError" in result.stdout
    assert "hooks: create_runner, runner_config" in result.stdout
    assert "1 of 2 plugins named 'mock' cannot be used" in result.stderr
    assert run("plugins", "show", "mock@nanovllm").exit_code == 0


def test_plugins_show_of_other_kinds(install: Install) -> None:
    install("acme", {"nanovllm.commands": "hello = acme_hello:hello"}, acme_hello=HELLO)
    assert "object: <Command hello>" in run("plugins", "show", "hello").stdout


# ------------------------------------------------------------------------------------------- config


def test_config_show_gives_each_value_its_origin(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("scheduler: {max_num_seqs: 3}\nenforce_eager: true\n")
    arguments = ["config", "show", "-c", str(tmp_path / "x.yaml"), "-r", "mock", "--set", "cache.block_size=8"]
    result = run(*arguments, MODEL_PATH="some-model")
    lines = dict(re.fullmatch(r"(\S+: .*?) +# (.*)", line).groups() for line in result.stdout.splitlines()[:-1])
    assert lines['runner.type: "mock"'] == "command line"
    assert lines["scheduler.max_num_seqs: 3"] == str(tmp_path / "x.yaml")
    assert lines["cache.block_size: 8"] == "--set"
    assert lines['model: "some-model"'] == "environment variable MODEL_PATH"
    assert lines["cache.prefix_caching: true"] == "default"
    assert result.stdout.splitlines()[-1].startswith("# enforce_eager (")
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["values"]["scheduler.max_num_seqs"] == {"value": 3, "origin": str(tmp_path / "x.yaml")}
    assert len(document["notes"]) == 1


def test_what_config_show_prints_is_a_configuration_file(tmp_path: Path) -> None:
    arguments = [
        "-r",
        "mock",
        "--set",
        "runner.script.fail_steps=[1, 2]",
        "--set",
        "eos=[7]",
        "--set",
        "cache.memory=1MiB",
    ]
    path = tmp_path / "copy.yaml"
    path.write_text(run("config", "show", *arguments).stdout)
    loaded = load(path, environ={})
    assert loaded.config.runner.options == {"script": {"fail_steps": [1, 2]}}
    assert run("config", "show", "-c", str(path)).stdout.split("#")[0] == path.read_text().split("#")[0]
    assert dict(leaves(loaded.config)) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        ("runner: {type: mock, seed: 3}\n", 0, ": ok\n"),
        ("runner: mock\ntensor_parallel_size: 1\n", 0, "note: tensor_parallel_size ("),
        ("runner: {type: mock, sede: 3}\n", 2, "unknown key 'runner.sede'"),
        ("runner: nothing\n", 3, "no runner named 'nothing' is installed"),
        ("runner: mock\ntokenizer: {type: simple, path: x, y: 1}\n", 2, "unknown key 'tokenizer.y'"),
        ("runner: mock\nplugins: [absent]\n", 3, "no observer named 'absent' is installed"),
    ],
)
def test_config_check(tmp_path: Path, text: str, status: int, says: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    result = run("config", "check", str(tmp_path / "x.yaml"), NANOVLLM_NOT_A_KEY="ignored: only the file is checked")
    assert result.exit_code == status
    assert says in (result.stderr if status else result.stdout)


def test_config_schema() -> None:
    document = json.loads(run("config", "schema").stdout)
    assert set(document["properties"]) == {*Config.model_fields, "profile", "profiles"}
    assert run("config", "schema", "--markdown").stdout == schema.markdown()


def test_config_errors_end_with_status_2() -> None:
    result = run("config", "show", "--set", "scheduler.max_num_seq=4")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: unknown key 'scheduler.max_num_seq' (--set); did you mean 'max_num_seqs'?\n"


# ------------------------------------------------------------------------------------------- the page


def test_every_command_of_this_project_is_on_the_page_of_commands() -> None:
    from nanovllm.plugins import discover
    from support import REPO

    ours = {*_COMMANDS, *(f.name for f in discover("commands") if f.distribution.startswith("nanovllm"))}
    page = (REPO / "docs" / "commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## (.+)$", page, re.MULTILINE)) == ours


FAULTY = """
from nanovllm.builtin.mock import MockRunner
from nanovllm.hookspecs import hookimpl

class Faulty(MockRunner):
    def forward(self, packed):
        return 1 / 0

class Plugin:
    api_version = 1

    @hookimpl
    def create_runner(self, ctx):
        return Faulty()

plugin = Plugin()
"""


@pytest.mark.parametrize("flags", [(), ("--debug",)], ids=["plain", "debug"])
def test_a_plugin_that_raises_is_a_sentence_and_a_traceback_only_with_debug(
    flags: tuple[str, ...], install: Install, tmp_path: Path
) -> None:
    install("acme", {"nanovllm.runners": "faulty = acme_faulty:plugin"}, acme_faulty=FAULTY)
    done = subprocess.run(
        [sys.executable, "-m", "nanovllm", *flags, "generate", "-r", "faulty", "--tokenizer", "simple", "hello"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (1 if flags else 5)
    assert "step 1 failed: ZeroDivisionError: division by zero\n" in done.stderr
    assert ("Traceback" in done.stderr) == bool(flags)
