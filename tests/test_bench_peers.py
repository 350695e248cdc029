"""The peers script: its arguments, peers in a Python of their own, several configurations, equal tokens."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from types import ModuleType

import pytest

from support import REPO
from test_bench_models import models

PEERS = REPO / "benchmarks" / "peers"
unix = pytest.mark.skipif(sys.platform == "win32", reason="environments of links and scripts")
WORKLOAD = {"requests": [{"prompt": [1, 2, 3], "out": 4}, {"prompt": [9], "out": 2}], "p512": [5] * 8, "p32": [6, 7]}

# A vllm that answers every prompt with its first token; its version tells where it runs and what it was given.
VLLM = """
import sys
from types import SimpleNamespace as Object
class SamplingParams(Object):
    pass
class LLM:
    def __init__(self, **options):
        global __version__
        __version__ = f"{options['dtype']} of {options['model']} in {sys.prefix}"
    def generate(self, prompts, params, use_tqdm):
        answers = [prompt["prompt_token_ids"][:1] * p.max_tokens for prompt, p in zip(prompts, params)]
        return [Object(outputs=[Object(token_ids=ids)]) for ids in answers]
"""

# A llama-server that gives the last token of a prompt, as often as is asked; its version is how it was called.
LLAMA_SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"status": "ok", "build_info": " ".join(sys.argv[1:9])})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"tokens": body["prompt"][-1:] * body["n_predict"]})
    def answer(self, document):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())
    def log_message(self, *args):
        pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def peers(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PEERS / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.make("gpt2-tiny", tmp_path / "m")


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "w.json"
    path.write_text(json.dumps(WORKLOAD), encoding="utf-8")
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(PEERS)
    return importlib.import_module("run")


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment with a vllm, a llama-server, numpy, and no nanovllm."""
    directory = tmp_path / "environment"
    venv.create(directory, symlinks=True)
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "vllm.py").write_text(VLLM, encoding="utf-8")
    numpy = importlib.util.find_spec("numpy")
    assert numpy is not None
    for package in Path(str(numpy.origin)).parents[1].glob("numpy*"):  # numpy.libs too
        (site / package.name).symlink_to(package)
    server = directory / "bin" / "llama-server"
    server.write_text(f"#!{sys.executable}\n{LLAMA_SERVER}", encoding="utf-8")
    server.chmod(0o755)
    return directory


@unix
def test_a_peer_runs_in_a_python_of_its_own(model: Path, workload: Path, environment: Path, tmp_path: Path) -> None:
    out, configs = tmp_path / "out.json", []
    for name, seed in (("a", 1), ("b", 2)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"model: demo\nrunner: {{type: mock, seed: {seed}}}\n", encoding="utf-8")
        configs += ["--config", f"{name}={file}"]
    python = environment / "bin" / "python"
    result = peers(
        "--model", model, "--workload", workload, "--runs", "2", "--dtype", "bf16", "--json", out, *configs,
        "--peers", "vllm,openvino", "--python", f"vllm={python}", "--python", f"openvino={python}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [r["name"] for r in document["results"]] == ["a", "b", "vllm"]
    assert document["results"][2]["facts"]["version"] == f"bfloat16 of {model} in {environment}"
    assert {(r["first"], r["second"]) for r in document["ratios"]} == {("a", "b"), ("a", "vllm"), ("b", "vllm")}
    assert {len(r["values"]) for r in document["ratios"] if r["metric"] == "throughput"} == {2}
    assert [(a["num_equal"], a["num_requests"]) for a in document["agreements"]] == [(0, 2)] * 3
    assert list(document["failures"]) == ["openvino"]
    assert f"openvino_genai is not installed for {python}; give another by --python openvino=PATH" in result.stdout


def test_a_configuration_keeps_its_model(tmp_path: Path, run: ModuleType) -> None:
    for text, model in (("model: mine", "mine"), ("eos: [3]", "given")):
        file = tmp_path / "a.yaml"
        file.write_text(text, encoding="utf-8")
        settings = run.our_engine("a", str(file), Path("given"), "mock", ["runner.threads=3"]).settings["overrides"]
        assert (settings["model"], settings["runner.type"], settings["runner.threads"]) == (model, "mock", 3)


@unix
def test_llama_server_is_found_beside_its_python_and_ends_with_its_parent(
    model: Path, workload: Path, environment: Path, tmp_path: Path
) -> None:
    out, gguf, python = tmp_path / "out.json", tmp_path / "x.gguf", environment / "bin" / "python"
    gguf.touch()
    result = peers(
        "--model", model, "--workload", workload, "--runs", "1", "--threads", "3", "--json", out, "--runner", "mock",
        "--peers", "llama.cpp-8,llama.cpp", "--python", f"llama.cpp-8={python}", "--path", f"llama.cpp-8={gguf}",
        "--python", f"llama.cpp={python}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [r["name"] for r in document["results"]] == ["nanovllm", "llama.cpp-8"]
    facts = document["results"][1]["facts"]
    assert facts["version"] == f"-m {gguf} -t 3 -tb 3 -np 8"
    assert f"{model} is no GGUF file; give its model by --path llama.cpp=PATH" in result.stdout
    if sys.platform == "linux":
        assert document["results"][1]["peak_memory"] > 1e6  # the server's
    deadline = time.monotonic() + 20
    while is_alive(facts["pid"]):
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "nobody"], "no peer is called 'nobody'"),
        (["--runs", "0"], "--runs must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        ([], "holds no config.json"),
        (["--path", "nobody=x"], "no peer is called 'nobody'"),
        (["--python", "nobody=x"], "no peer is called 'nobody'"),
        (["--python", "vllm"], "'vllm' is not of the form NAME=VALUE"),
        (["--config", "=a.yaml"], "'=a.yaml' is not of the form NAME=VALUE"),
        (["--config", "a=a.yaml", "--config", "a=b.yaml"], "two contestants are called 'a'"),
        (["--config", "vllm=a.yaml", "--peers", "vllm"], "two contestants are called 'vllm'"),
    ],
)
def test_bad_usage_of_the_peers_script(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    run: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--model", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2-tiny", "qwen2-tiny"])
def test_transformers_gives_our_tokens(shape: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    directory, out = models.make(shape, tmp_path / "m"), tmp_path / "out.json"
    workload = tmp_path / "w.json"
    jobs = [{"prompt": [(i * k) % 256 for i in range(1, 6 * k)], "out": 20 - k} for k in range(1, 11)]
    workload.write_text(json.dumps({"requests": jobs, "p512": jobs[-1]["prompt"], "p32": [1, 2, 3]}), encoding="utf-8")
    result = peers(
        "--model", directory, "--workload", workload, "--peers", "transformers,transformers-cb", "--runs", "1",
        "--json", out,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["failures"] == {}
    assert [(a["first"], a["second"], a["num_equal"]) for a in document["agreements"]] == [
        ("nanovllm", "transformers", 10),
        ("nanovllm", "transformers-cb", 10),
    ]
    assert {r["metric"] for r in document["ratios"]} == {"prefill", "decode", "throughput"}
