"""What `runner: {type: http, ...}` takes and refuses, and that naming the plugin loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from nanovllm.cli import cli
from nanovllm_runner_http.options import HttpOptions, TokenizerOptions

URL = "http://127.0.0.1:8080"


def options(**values: Any) -> HttpOptions:
    return HttpOptions.model_validate(values)


def test_the_least_that_is_needed_is_an_address() -> None:
    assert options(url=URL).addresses == (URL,)
    assert options(url="https://host/prefix/").addresses == ("https://host/prefix",)
    assert options(servers=[URL, "http://[::1]:9"]).addresses == (URL, "http://[::1]:9")
    assert TokenizerOptions.model_validate({"url": URL}).url == URL


def test_a_started_server_has_no_address() -> None:
    for managed in (options(llamafile="./m.llamafile", args=["-c", "9"]), options(command=["llama-server", "-m", "x"])):
        assert managed.is_managed
        assert managed.addresses == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "one of url, servers, llamafile and command .* none is given"),
        ({"url": URL, "servers": [URL]}, "url and servers are given"),
        ({"url": URL, "llamafile": "x"}, "url and llamafile are given"),
        ({"servers": [URL, URL + "/"]}, "names an address twice"),
        ({"url": URL, "args": ["-c"]}, "args belong to llamafile or command"),
        ({"url": URL, "mode": "step", "dialect": "openai"}, "mode step needs dialect nanovllm"),
        ({"url": "127.0.0.1:8080"}, "must be an address"),
        ({"url": "ftp://host"}, "must be an address"),
        ({"url": "http://host:port"}, "must be an address"),
        ({"url": "http://host:99999"}, "must be an address"),
        ({"url": "http://"}, "must be an address"),
        ({"url": "http://user:secret@host"}, "no user name and no password"),
        ({"url": "http://host?x=1"}, "no query, no fragment"),
        ({"url": "http://host/#x"}, "no query, no fragment"),
        ({"url": "http://host/a b"}, "no query, no fragment and no space"),
        ({"url": "http://host/\r\nX: y"}, "no space|must be an address"),
        ({"url": URL, "api_key_env": "sk-key"}, "must be the name of an environment variable"),
        ({"url": URL, "api_key_env": "A", "api_key_file": "b"}, "both given"),
        ({"url": URL, "ca_file": "a", "verify": False}, "trusts everybody"),
        ({"url": URL, "timeouts": {"read": 0}}, "greater than 0"),
        ({"url": URL, "timeouts": {"read": float("nan")}}, "less than or equal"),
        ({"url": URL, "timeouts": {"raed": 1}}, "Extra inputs"),
        ({"url": URL, "retries": -1}, "greater than or equal to 0"),
        ({"url": URL, "retries": True}, "valid integer"),
        ({"url": URL, "dialect": "grpc"}, "auto"),
        ({"url": URL, "surprise": 1}, "Extra inputs"),
        ({"servers": [f"http://h:{i}" for i in range(1, 66)]}, "at most 64"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_reason(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        options(**values)


@pytest.mark.parametrize(
    "told",
    [
        ["runner.url=http://user:hunter2@host:1"],
        ["runner.url=http://user:hunter2@host:port"],
        ["runner.url=http://user:hun/ter@2hunter2@host"],
        ["runner.url=ftp://user:hunter2@host"],
        ["runner.url=http://host/?api_key=hunter2"],
        ["runner.servers=['http://host:1', 'http://user:hunter2@host:2']"],
        ["runner.url=http://host", "runner.proxy=http://user:hunter2@host"],
        ["runner.url=http://host", "runner.api_key=hunter2"],
        ["runner.url=http://host", "runner.api_key_env=sk-hunter2"],
        ["runner.url=http://host", "tokenizer.type=http", "tokenizer.url=http://user:hunter2@host"],
    ],
)
def test_no_message_and_no_listing_shows_a_secret(told: list[str]) -> None:
    sets = [word for value in ("runner.type=http", *told) for word in ("--set", value)]
    refused = CliRunner().invoke(cli, ["ask", "-m", "some-model", *sets, "hello"])
    assert refused.exit_code == 2
    assert refused.output.startswith(("error: runner.", "error: tokenizer.", "error: unknown key 'runner.api_key'"))
    shown = [CliRunner().invoke(cli, ["config", "show", *more, *sets]).output for more in ([], ["--json"])]
    assert all("runner.type" in text for text in shown)
    assert "hunter2" not in refused.output + "".join(shown)


def test_importing_the_plugin_loads_neither_requests_nor_pydantic() -> None:
    code = "import sys, nanovllm_runner_http as p; p.plugin, p.tokenizer_plugin; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"requests", "urllib3", "pydantic"}.isdisjoint(done.stdout.split())
