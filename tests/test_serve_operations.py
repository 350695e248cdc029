"""`nanovllm serve` for those who run it: readiness, logs, who is let in, its options and where they come from."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from click.testing import CliRunner

from http_support import wait_until
from nanovllm import SamplingParams
from nanovllm.aio import AsyncLLM
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm.cli import cli
from nanovllm.config import load
from nanovllm.errors import ConfigError, EngineDead, ModelError
from nanovllm.schema import table
from nanovllm_server import logs
from nanovllm_server.app import create_app
from nanovllm_server.environment import ALIASES, read_environment
from nanovllm_server.keys import Keys
from nanovllm_server.lifecycle import Lifecycle
from nanovllm_server.options import ServerOptions, server_options
from nanovllm_server.serving import uvicorn_config
from serve_support import Served, serving
from support import REPO

KEY = "k" * 20
ASK = {"model": "model", "prompt": "hello world", "max_tokens": 3, "temperature": 0}


def probe(served: Served, path: str) -> tuple[int, str]:
    status, body = served.call("GET", path)
    return status, json.loads(body)["status"]


# ------------------------------------------------------------------------------------------ readiness


def test_ready_and_live_while_it_works() -> None:
    with serving() as served:
        assert probe(served, "/livez") == probe(served, "/readyz") == (200, "ready")


def test_not_ready_while_a_step_hangs_and_live_all_the_same() -> None:
    now = [0.0]
    runner = MockRunner(script=Script(hang_step=2))
    with serving(runner, stall_seconds=5, clock=lambda: now[0]) as served:
        asking = threading.Thread(target=served.post, args=("/v1/completions", ASK))
        asking.start()
        wait_until(lambda: served.llm.health().num_running == 1 and served.llm.stats().num_steps == 1)
        now[0] = 5.0
        assert probe(served, "/readyz") == (200, "ready")
        now[0] = 5.1
        assert probe(served, "/readyz") == (503, "stalled")
        assert probe(served, "/livez") == (200, "stalled")
        runner.close()  # the step goes on
        asking.join()
        assert probe(served, "/readyz") == (200, "ready")


def test_neither_live_nor_ready_once_the_engine_is_dead() -> None:
    with serving(MockRunner(script=Script(dead_step=1))) as served:
        assert served.post("/v1/completions", ASK)[0] == 500
        assert probe(served, "/livez") == probe(served, "/readyz") == (503, "dead")
        status, body = served.post("/v1/completions", ASK)
        assert (status, body["error"]["code"]) == (503, "engine_dead")


def test_draining_refuses_what_is_new_and_ends_what_runs() -> None:
    with serving(MockRunner(script=Script(delay=0.01))) as served:
        answers: list[Any] = []
        body = {**ASK, "max_tokens": 60, "ignore_eos": True}
        asking = threading.Thread(target=lambda: answers.append(served.post("/v1/completions", body)))
        asking.start()
        wait_until(lambda: served.llm.stats().num_steps > 2)
        served.state.admission.is_draining = True
        assert probe(served, "/readyz") == (503, "draining")
        assert probe(served, "/livez") == (200, "draining")
        status, refused = served.post("/v1/completions", ASK)
        assert (status, refused["error"]["code"]) == (503, "shutting_down")
        asking.join()
        assert answers[0][0] == 200
        assert answers[0][1]["usage"]["completion_tokens"] == 60


@contextmanager
def living(monkeypatch: pytest.MonkeyPatch, make: Any) -> Iterator[tuple[int, Lifecycle]]:
    """A server with a lifecycle, whose model is what `make()` returns; yields its port."""
    monkeypatch.setattr(AsyncLLM, "from_config", lambda config: make())
    server: uvicorn.Server
    lifecycle = Lifecycle(on_loaded=lambda: None, on_end=lambda: setattr(server, "should_exit", True))
    app = create_app(keys=Keys(), options=ServerOptions(drain_seconds=5), lifecycle=lifecycle)
    server = uvicorn.Server(uvicorn_config(app, ServerOptions(), port=0))
    running = threading.Thread(target=lambda: asyncio.run(server.serve()))
    running.start()
    try:
        wait_until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1], lifecycle
    finally:
        lifecycle.stop()
        running.join(20)
        assert not running.is_alive()


def get(port: int, path: str) -> tuple[int, str]:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read()).get("status", "")
    finally:
        connection.close()


def mock() -> AsyncLLM:
    from nanovllm.builtin.simple_bpe import SimpleBPETokenizer

    return AsyncLLM.from_components(MockRunner(), SimpleBPETokenizer())


def test_live_and_not_ready_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def slowly() -> AsyncLLM:
        assert gate.wait(20)
        return mock()

    with living(monkeypatch, slowly) as (port, _):
        assert get(port, "/livez") == (200, "loading")
        assert get(port, "/readyz") == (503, "loading")
        assert get(port, "/v1/models")[0] == 503
        gate.set()
        wait_until(lambda: get(port, "/readyz") == (200, "ready"))


def test_told_to_stop_while_it_loads_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    with living(monkeypatch, lambda: (gate.wait(20), mock())[1]) as (_, lifecycle):
        wait_until(lambda: lifecycle.is_loading)
        lifecycle.stop()
    assert lifecycle.is_loading
    assert lifecycle.error is None
    gate.set()


def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def fails() -> AsyncLLM:
        assert gate.wait(20)
        raise ModelError("no such weights")

    with living(monkeypatch, fails) as (_, lifecycle):
        gate.set()
        wait_until(lambda: lifecycle.error is not None)
    assert isinstance(lifecycle.error, ModelError)


def test_a_dead_engine_ends_it_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.builtin.simple_bpe import SimpleBPETokenizer

    runner = MockRunner(script=Script(dead_step=1))
    llm = []

    def make() -> AsyncLLM:
        llm.append(AsyncLLM.from_components(runner, SimpleBPETokenizer()))
        return llm[0]

    with living(monkeypatch, make) as (port, lifecycle):
        wait_until(lambda: get(port, "/readyz")[0] == 200)

        async def ask() -> None:
            await llm[0].generate("x", SamplingParams(max_tokens=2))

        with pytest.raises(Exception, match="script ends"):
            asyncio.run(ask())
        wait_until(lambda: lifecycle.error is not None)
    assert isinstance(lifecycle.error, EngineDead)


# ----------------------------------------------------------------------------------------------- logs


@contextmanager
def logged(log_format: str = "json") -> Iterator[io.StringIO]:
    """The log as `serve` writes it."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    uvicorns = logging.getLogger("uvicorn.error").level
    logs.configure(log_format)
    for handler in root.handlers:
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(stream)
    try:
        yield stream
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("uvicorn.error").setLevel(uvicorns)
        logging.captureWarnings(False)


def test_a_line_for_each_call_with_its_id_and_without_what_was_asked_or_any_key() -> None:
    with logged() as log, serving(keys=Keys([KEY])) as served:
        bearer = {"Authorization": f"Bearer {KEY}", "X-Request-ID": "mine-1"}
        asked = {**ASK, "prompt": "a very private question", "user": "someone private"}
        status, answer = served.post("/v1/completions?token=secret-in-query", asked, **bearer)
        assert status == 200, answer
        served.post("/v1/completions", {**ASK, "n": 0}, **bearer)
        served.post("/v1/completions", ASK, Authorization="Bearer wrong-wrong-wrong-wrong")
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    calls = [line for line in lines if line["message"] == "call"]
    good, wrong, refused = calls
    assert good["request_id"] == "mine-1"
    assert "mine-1" in answer["id"]
    assert (good["route"], good["status"], good["method"]) == ("/v1/completions", 200, "POST")
    assert (good["prompt_tokens"], good["completion_tokens"]) == (
        answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"],
    )  # fmt: skip
    assert good["key"] == Keys([KEY]).owner(f"Bearer {KEY}".encode())
    assert (wrong["status"], wrong["error"]) == (400, "invalid_request_error")
    assert (refused["status"], refused["error"], refused["key"]) == (401, "invalid_api_key", "")
    for secret in (KEY, "wrong-wrong", "private", "secret-in-query", answer["choices"][0]["text"]):
        assert secret not in log.getvalue()


def test_prompts_are_logged_only_where_that_is_asked_for() -> None:
    with logged() as log, serving(options=ServerOptions(log_prompts=True)) as served:
        served.post("/v1/completions", {**ASK, "prompt": "what is it?"})
    assert json.loads(log.getvalue().splitlines()[-1])["prompts"] == ["what is it?"]


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "ä", 'a"b', "a/b"])
def test_an_id_that_is_none_is_replaced(keyless: Served, given: str) -> None:
    status, headers = _headers(keyless, "/livez", {"X-Request-ID": given.encode("latin-1")})
    assert status == 200
    assert len(headers["x-request-id"]) == 32
    assert _headers(keyless, "/livez", {"X-Request-ID": b"A-1._"})[1]["x-request-id"] == "A-1._"


def _headers(served: Served, path: str, headers: dict[str, Any], method: str = "GET") -> tuple[int, dict[str, str]]:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        response.read()
        return response.status, {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()


def test_a_failure_is_logged_under_the_id_of_its_call() -> None:
    with logged() as log, serving(MockRunner(script=Script(fail_steps=(1,)))) as served:
        assert served.post("/v1/completions", ASK, X_Request_ID="r-7")[0] == 500
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert any(line["level"] == "error" and line.get("request_id") == "r-7" for line in lines)
    assert lines[-1]["error"] == "generation_failed"


def test_the_log_for_people_is_a_line_a_call_too() -> None:
    with logged("text") as log, serving() as served:
        served.post("/v1/completions", ASK)
    line = log.getvalue().splitlines()[-1]
    assert 'route="/v1/completions"' in line
    assert "status=200" in line


# ------------------------------------------------------------------------------------- who is let in


@pytest.mark.parametrize(
    ("host", "is_let_in"),
    [
        ("127.0.0.1", True), ("127.0.0.1:8000", True), ("localhost", True), ("LOCALHOST:1", True), ("[::1]:80", True),
        ("127.9.9.9", True), ("model.example:80", True), ("localhost.", True),
        ("evil.example", False), ("127.0.0.1.evil.example", False), ("localhost.evil.example", False), ("", False),
        ("10.0.0.1", False), ("evil.example#@127.0.0.1", False), ("evil.example/127.0.0.1", False),
    ],
)  # fmt: skip
def test_without_keys_only_this_machines_names_are_served(keyless: Served, host: str, is_let_in: bool) -> None:
    """A web page whose name points at 127.0.0.1 is told nothing (DNS rebinding)."""
    for path in ("/livez", "/v1/models"):
        status, _ = keyless.call("GET", path, Host=host)
        assert (status == 200) == is_let_in
        assert status in (200, 400, 403)


@pytest.fixture(scope="module")
def keyless() -> Iterator[Served]:
    with serving(options=ServerOptions(allowed_hosts=("Model.example",))) as served:
        yield served


def test_with_keys_any_name_is_served() -> None:
    with serving(keys=Keys([KEY])) as served:
        assert served.call("GET", "/v1/models", Host="any.example", Authorization=f"Bearer {KEY}")[0] == 200


def test_other_origins_may_call_only_where_they_are_named() -> None:
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with serving(keys=Keys([KEY])) as served:
        status, headers = _headers(served, "/v1/completions", asks, "OPTIONS")
        assert status == 401
        assert not any(name.startswith("access-control") for name in headers)
    with serving(keys=Keys([KEY]), options=ServerOptions(cors_origins=("https://a.example",))) as served:
        status, headers = _headers(served, "/v1/completions", asks, "OPTIONS")
        assert (status, headers["access-control-allow-origin"]) == (200, "https://a.example")
        other = {**asks, "Origin": "https://b.example"}
        assert "access-control-allow-origin" not in _headers(served, "/v1/completions", other, "OPTIONS")[1]
        assert _headers(served, "/v1/models", {"Origin": "https://a.example"})[0] == 401  # still with a key only


@pytest.mark.parametrize("origin", ["*", "https://*.example", "a.example", "https://a.example/", ""])
def test_an_origin_is_named_in_full(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.cors_origins"):
        server_options(load(overrides={"server": {"cors_origins": [origin]}}, environ={}), {})


def test_metrics_ask_for_a_key_and_probes_do_not() -> None:
    with serving(keys=Keys([KEY])) as served:
        assert served.call("GET", "/metrics")[0] == 401
        assert served.call("GET", "/metrics", Authorization=f"Bearer {KEY}")[0] == 200
        assert probe(served, "/readyz") == (200, "ready")


# ------------------------------------------------------------------------------- options and environment


def test_options_come_from_file_environment_and_flags_in_that_order(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("server: {port: 1, max_queue: 2, drain_seconds: 3}\n")
    loaded = load(tmp_path / "c.yaml", environ={"NANOVLLM_SERVER__PORT": "4", "NANOVLLM_SERVER__MAX_QUEUE": "5"})
    options = server_options(loaded, {"port": 6, "host": None})
    assert (options.port, options.max_queue, options.drain_seconds, options.host) == (6, 5, 3.0, "127.0.0.1")
    assert loaded.origins["server.max_queue"] == "environment variable NANOVLLM_SERVER__MAX_QUEUE"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"max_qeue": 1}, "unknown key 'server.max_qeue' (argument); did you mean 'max_queue'?"),
        ({"port": 70000}, "server.port: should be less than or equal to 65535, not 70000 (argument)"),
        ({"port": True}, "server.port: should be a valid integer, not True (argument)"),
        ({"drain_seconds": float("inf")}, "server.drain_seconds: should be a finite number"),
        ({"tls_key": "k.pem"}, "server: tls_key needs tls_certificate"),
        ({"log_format": "xml"}, "server.log_format: should be 'json' or 'text'"),
    ],
)
def test_a_wrong_option_is_named_with_its_origin(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        server_options(load(overrides={"server": section}, environ={}), {})
    assert message in str(e.value).replace("\n", "; ")


def test_the_seeds_names_count_in_the_environment_and_host_only_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("GENAI_MODEL_DIR=./genai-model\nGENAI_MAX_LENGTH=2048\nPORT=8002\nHOST=0.0.0.0\nRELOAD=false\n")
    environ = read_environment({"HOST": "some-machine", "PORT": "9000", "GENAI_DEVICE": "cpu", "WORKERS": "9"}, file)
    loaded = load(environ=environ, environ_aliases=ALIASES)
    assert loaded.config.model == "./genai-model"
    assert loaded.config.scheduler.max_model_len == 2048
    assert loaded.config.runner.options == {"device": "cpu"}
    assert server_options(loaded, {}).port == 9000  # the environment wins
    assert server_options(loaded, {}).host == "0.0.0.0"
    assert "HOST" not in read_environment({"HOST": "some-machine"}, tmp_path / "none")
    assert "some-machine" not in environ.values()


def test_they_are_for_whichever_runner_is_chosen_and_the_weakest_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("runner: {type: onnx, device: directml}\nserver: {port: 1}\n")
    environ = {"GENAI_DEVICE": "cpu", "PORT": "2"}
    for sets in ([], ["runner=onnx"], ["runner=torch"]):
        for file in (None, tmp_path / "c.yaml"):
            loaded = load(file, environ=environ, environ_aliases=ALIASES, sets=sets)
            assert (loaded.config.runner.options, loaded.config.server) == ({"device": "cpu"}, {"port": 2})
    environ |= {"NANOVLLM_RUNNER__DEVICE": "cuda"}
    loaded = load(environ=environ, environ_aliases=ALIASES, sets=["server.port=3"])
    assert (loaded.config.runner.options, loaded.config.server) == ({"device": "cuda"}, {"port": 3})


def test_more_than_one_worker_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("WORKERS=2\n")
    with pytest.raises(ConfigError, match=r"WORKERS=2 .*; for more capacity run several servers"):
        read_environment({}, tmp_path / ".env")
    (tmp_path / ".env").write_text("WORKERS=1\n")
    assert read_environment({}, tmp_path / ".env") == {}


def test_a_key_in_the_environment_is_no_configuration_and_is_shown_nowhere() -> None:
    loaded = load(environ={"NANOVLLM_API_KEY": KEY, "NANOVLLM_MODEL": "demo"})
    assert KEY not in repr(loaded)
    result = CliRunner().invoke(cli, ["config", "show"], env={"NANOVLLM_API_KEY": KEY})
    assert result.exit_code == 0
    assert KEY not in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--host", "0.0.0.0"], 2, "lets other machines in, and no API keys are set"),
        (["--set", "server.host=0.0.0.0"], 2, "lets other machines in"),
        (["--set", "server.nothing=1"], 2, "unknown key 'server.nothing' (--set)"),
        (["--set", "server.tls_certificate=/nothing.pem"], 2, "server.tls_certificate /nothing.pem cannot be used"),
        (["--api-key-file", "/nothing"], 2, "the key file /nothing cannot be read"),
        (["--model", "/nothing/here", "--runner", "numpy"], 4, "/nothing/here"),
        (["--runner", "nothing"], 3, "no runner named 'nothing' is installed"),
    ],
)
def test_what_cannot_be_served_ends_at_once_with_a_reason(
    arguments: list[str], status: int, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with logged():
        ended = CliRunner().invoke(cli, ["serve", "--port", "0", *arguments])
    assert (ended.exit_code, message in ended.output) == (status, True), ended.output


def test_a_device_that_is_none_is_answered_with_those_that_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GENAI_DEVICE=tpu\n")
    monkeypatch.chdir(tmp_path)
    with logged():
        ended = CliRunner().invoke(cli, ["serve", "--port", "0", "--runner", "onnx"])
    assert ended.exit_code == 2
    assert "runner.device" in ended.output
    assert "(environment variable GENAI_DEVICE)" in ended.output
    for device in ("cpu", "cuda", "directml"):
        assert device in ended.output


def test_help_imports_neither_a_server_nor_an_engine() -> None:
    code = (
        "import sys; from nanovllm.cli import cli\n"
        "cli(['serve', '--help'], standalone_mode=False)\n"
        "print([m for m in ('fastapi', 'uvicorn', 'starlette', 'prometheus_client', 'dotenv', 'numpy', 'pydantic') "
        "if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "server:" in shown
    assert shown.splitlines()[-1] == "[]"


def test_the_page_has_every_option() -> None:
    page = (REPO / "docs" / "server" / "operations.md").read_text("utf-8")
    assert page.endswith("\n".join(table(ServerOptions.model_json_schema()["properties"])) + "\n"), (
        "run scripts/configuration_docs.py"
    )
