"""`nanovllm plugins test`: the table, the document, and what ends in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from model_cases import MODELS
from nanovllm import hookspecs
from nanovllm.cli import cli
from site_of_fakes import Install, fake_site

PLUGIN = """
from nanovllm.hookspecs import hookimpl
{before}

class Plugin:
    api_version = {version}

    @hookimpl
    def create_tokenizer(self, ctx):
        from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
        {making}

plugin = Plugin()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from fake_site(tmp_path / "site", monkeypatch)


def acme(
    install: Install, making: str = "return SimpleBPETokenizer()", *, before: str = "", version: int = 1, **more: Any
) -> None:
    source = PLUGIN.format(before=before, version=version, making=making)
    install("acme", {"nanovllm.tokenizers": "acme = acme_tok:plugin"}, acme_tok=source, **more)


def run(*arguments: str) -> Result:
    return CliRunner(env={"MODEL_PATH": None, "TOKENIZER_PATH": None}).invoke(cli, ["plugins", "test", *arguments])


# ------------------------------------------------------------------------------------------ the table


def test_a_good_plugin_is_a_table_by_level(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acme(install)
    install("loud", {"pytest11": "loud = loud_plugin"}, loud_plugin="1 / 0")  # other people's pytest plugins
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = run("acme")
    assert list(Path.cwd().iterdir()) == []
    assert (result.exit_code, result.stderr) == (0, "")
    first, head, *rows = result.stdout.splitlines()
    assert first == "tokenizer acme (acme 1.0, plugin API 1)"
    assert head.split() == ["level", "passed", "failed", "skipped"]
    assert [row.split()[0] for row in rows if row] == ["basic", "batched", "robust", "deterministic", "fast"]
    assert all(row.split()[2:4] == ["0", "0"] for row in rows if row)
    assert rows[4].endswith("times the speed of the built-in tokenizer")


def test_a_failure_is_its_test_and_one_sentence(install: Install) -> None:
    acme(install, "t = SimpleBPETokenizer(); t.eos_ids = (9000,); print('made'); return t")
    result = run("acme", "-v")
    assert result.exit_code == 1
    failed = re.findall(r"^failed +(\w+) +(\w+): (.*)$", result.stdout, re.MULTILINE)
    assert sorted(failed) == [
        ("basic", "test_end_ids_are_of_the_vocabulary", "eos_ids gives the id 9000, and vocab_size is 125"),
        ("robust", "test_it_leaves_stdout_alone", "it wrote to stdout, which belongs to the answers: 'made'"),
    ]
    table, _, account = result.stdout.partition("\n\n")
    assert "passed  basic         test_every_id_has_bytes" in table
    assert "AssertionError" not in table
    assert "AssertionError: eos_ids gives the id 9000" in account


def test_one_that_hangs_when_it_is_made_is_one_failure(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.testing import TokenizerConformance

    monkeypatch.setattr(TokenizerConformance, "startup_seconds", 6)
    acme(install, "import time; time.sleep(600)")
    result = run("acme")
    assert result.exit_code == 1
    failed = re.findall(r"^failed .*$", result.stdout, re.MULTILINE)
    assert [" ".join(line.split()) for line in failed] == [
        "failed basic test_it_is_made: making it did not end within 6 seconds"
    ]


def test_one_that_hangs_in_a_test_has_failed_it(install: Install) -> None:
    acme(install, "import time; t = SimpleBPETokenizer(); t.decode = lambda ids: time.sleep(600); return t")
    result = run("acme", "--timeout", "10")
    assert result.exit_code == 1
    assert re.search(r"^failed .*: it did not end within 10 seconds$", result.stdout, re.MULTILINE)


def test_the_document_has_all_of_it(install: Install) -> None:
    acme(install)
    install("beta", {"nanovllm.tokenizers": "acme = nobodys:plugin"})  # the name alone would not do
    result = run("acme@acme", "--kind", "tokenizer", "--json", "--set", "scheduler.max_num_seqs=4", "-m", "demo")
    [document] = json.loads(result.stdout)
    assert result.exit_code == 0
    assert {k: v for k, v in document.items() if k != "results"} == {
        "kind": "tokenizer", "name": "acme", "distribution": "acme", "version": "1.0", "api_version": 1,
        "config": {"model": "demo", "tokenizer.type": "acme@acme"},
    }  # fmt: skip
    assert {r["outcome"] for r in document["results"]} == {"passed"}
    assert {r["level"] for r in document["results"]} == {"basic", "batched", "robust", "deterministic", "fast"}


def test_all_of_that_name_are_tested(install: Install) -> None:
    sampler = "from nanovllm.builtin.plugins import numpy_sampler as plugin"
    acme(install)
    install("other", {"nanovllm.samplers": "acme = acme_sampler:plugin"}, acme_sampler=sampler)
    [one, other] = json.loads(run("acme", "--json").stdout)
    assert [one["kind"], other["kind"]] == ["tokenizer", "sampler"]
    assert [one["config"], other["config"]] == [{"tokenizer.type": "acme"}, {"sampler.type": "acme"}]
    assert run("acme@acme", "--kind", "sampler").exit_code == 3


def test_a_yaml_file_configures_it(install: Install, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("tokenizer: {type: acme, times: 3}\nscheduler: {max_num_seqs: 2}\n")
    acme(install)
    result = run("acme", "-c", str(tmp_path / "x.yaml"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: tokenizers:acme@acme: unknown key 'tokenizer.times'")


# ------------------------------------------------------------------------------------------- families


def test_a_family_is_tested_on_a_small_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama"][2]))
    [document] = json.loads(run("llama", "-m", str(tmp_path), "--set", "tie_word_embeddings=true", "--json").stdout)
    assert (document["kind"], document["api_version"]) == ("family", None)
    assert document["config"]["tie_word_embeddings"] is True
    outcomes = {r["name"]: r["outcome"] for r in document["results"]}
    assert outcomes.pop("test_the_logits_are_those_of_transformers") in ("passed", "skipped")
    assert set(outcomes.values()) == {"passed"}


@pytest.mark.parametrize(
    ("config", "sets", "status", "said"),
    [
        (None, (), 2, "a model family is tested on a small config.json, of up to some million parameters; try:"),
        ("{", (), 4, "cannot be read: Expecting property name"),
        ("[]", (), 4, "holds no JSON object"),
        ('{"model_type": "mamba"}', (), 2, "is of model_type 'mamba', not 'llama'"),
        ("{}", ("vocab_size",), 2, "--set 'vocab_size' has no '='"),
        ("{}", ("vocab_size=[",), 2, "the value of --set 'vocab_size=[' cannot be read"),
    ],
)
def test_a_family_without_a_usable_config(
    config: str | None, sets: tuple[str, ...], status: int, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "small.json"
    if config is not None:
        path.write_text(config)
    arguments = () if config is None else ("-m", str(path))
    result = run("llama", *arguments, *(a for s in sets for a in ("--set", s)))
    assert result.exit_code == status
    assert said in result.stderr


# ------------------------------------------------------------------------------- what is one sentence


def one_line(result: Result, status: int) -> str:
    assert (result.exit_code, result.stdout) == (status, "")
    [line] = result.stderr.splitlines()
    return line


def test_one_that_nobody_installed() -> None:
    assert "no runner, tokenizer, sampler or model family named 'nope' is installed" in one_line(run("nope"), 3)
    assert "no tokenizer named 'numpy' is installed" in one_line(run("numpy", "--kind", "tokenizer"), 3)


def test_a_name_that_two_claim(install: Install) -> None:
    acme(install)
    install("beta", {"nanovllm.tokenizers": "acme = acme_tok:plugin"})
    line = one_line(run("acme"), 3)
    assert line == "error: tokenizer 'acme' is offered by acme 1.0 and beta 1.0; write acme@acme to choose"


def test_one_that_needs_another_core(install: Install) -> None:
    acme(install, requires="nanovllm>=99")
    assert "acme 1.0 needs nanovllm>=99, but nanovllm" in one_line(run("acme"), 3)


def test_one_that_was_written_for_another_interface(install: Install) -> None:
    acme(install, version=hookspecs.API_VERSION + 1)
    assert one_line(run("acme"), 3).endswith("; try: pip install --upgrade nanovllm")


def test_one_that_hangs_at_import(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.testing import TokenizerConformance

    monkeypatch.setattr(TokenizerConformance, "startup_seconds", 6)
    acme(install, before="import time; time.sleep(600)")
    line = one_line(run("acme"), 3)
    assert line == "error: tokenizers:acme@acme: importing it did not end within 6 seconds"


def test_one_that_cannot_be_imported(install: Install) -> None:
    acme(install, before="1 / 0")
    assert "'acme' of acme 1.0 cannot be imported: ZeroDivisionError" in one_line(run("acme"), 3)


def test_a_model_that_is_not_there() -> None:
    assert "directory" in one_line(run("numpy", "--kind", "runner", "-m", "./nowhere"), 4)


def test_suites_are_listed_and_shown() -> None:
    shown = CliRunner().invoke(cli, ["plugins", "show", "tokenizers"])
    assert shown.exit_code == 0
    assert "conformance:tokenizers@nanovllm" in shown.stdout
    assert "TokenizerConformance" in shown.stdout
    listed = CliRunner().invoke(cli, ["plugins", "list"]).stdout
    assert re.search(r"^conformance suite +tokenizers +nanovllm ", listed, re.MULTILINE)
