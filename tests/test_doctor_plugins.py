"""`nanovllm doctor`: what each plugin of ours finds out about itself, here and on machines with a planted fault."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from http_support import ScriptedServer
from nanovllm.doctor import Case, Finding, keep_busy
from nanovllm.loader import load_object
from nanovllm.plugins import discover, find, package_directory
from site_of_fakes import Install, fake_site
from support import REPO
from test_doctor import case, fake_nvidia
from test_http_llamacpp import llama_server

NOTHING = Case(None)
Examine = Callable[[Case], Iterator[Finding]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not measured needs no half a second of work."""
    monkeypatch.setattr(keep_busy, "__defaults__", (0.05,))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    yield from fake_site(tmp_path / "site", monkeypatch)


def examined(name: str, case: Case = NOTHING) -> list[Finding]:
    examine: Examine = load_object(find("doctors", name))  # type: ignore[assignment]
    return list(examine(case))


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


def test_every_distribution_of_ours_with_plugins_has_a_check() -> None:
    ours = {
        f.distribution for f in discover() if f.distribution.startswith("nanovllm-") and "example" not in f.distribution
    }
    assert {f.distribution for f in discover("doctors")} >= ours


@pytest.mark.parametrize("name", ["http", "models", "numpy", "server", "tokenizers"])
def test_without_a_configuration_nothing_is_wrong_here(name: str) -> None:
    assert {finding.level for finding in examined(name)} <= {"ok", "note"}


# --------------------------------------------------------------------------------------------- onnx


def test_the_provider_that_computed_is_named_with_the_library_and_its_version() -> None:
    import onnxruntime

    texts = [finding.text for finding in examined("onnx", case(runner="onnx", **{"runner.threads": 1}))]
    assert f"ONNX Runtime {onnxruntime.__version__} in {Path(onnxruntime.__file__).parent / 'capi'}" in texts[0]
    assert "a matrix product on cpu was computed by CPUExecutionProvider" in texts[1]
    assert texts[1].endswith("1 thread wanted")


def test_two_onnx_runtimes_at_once_are_an_error(install: Install) -> None:
    install("onnxruntime-gpu", {}, version=metadata.version("onnxruntime"))
    [finding] = errors(examined("onnx"))
    assert finding.text == "onnxruntime and onnxruntime-gpu are installed together and overwrite each other's files"
    assert finding.fix == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'nanovllm[onnx]'"


def test_a_library_that_is_not_what_is_installed_is_an_error(install: Install) -> None:
    install("onnxruntime", {}, version="1.0.0")
    [finding] = errors(examined("onnx"))
    assert "but what is installed is onnxruntime 1.0.0" in finding.text
    assert finding.fix == "pip uninstall -y onnxruntime && pip install 'nanovllm[onnx]'"


@pytest.mark.parametrize(("fallback", "level"), [([], "error"), (["cpu"], "warning")])
def test_a_device_that_cannot_be_had_is_named_with_its_pip_line(fallback: list[str], level: str) -> None:
    findings = examined("onnx", case(runner="onnx", **{"runner.device": "cuda", "runner.fallback": fallback}))
    [finding] = [f for f in findings if f.level in ("warning", "error")]
    assert finding.level == level
    assert finding.fix is not None
    assert "pip install 'nanovllm[onnx-cuda]'" in finding.fix


@pytest.mark.parametrize(("chosen", "level"), [(False, "note"), (True, "error")])
def test_an_absent_runtime_matters_where_it_is_chosen(
    chosen: bool, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanovllm_runner_onnx import doctor, install

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for module in (doctor, install):
        monkeypatch.setattr(module, "installed_distributions", list)
    [finding] = examined("onnx", case(runner="onnx") if chosen else NOTHING)
    assert finding.level == level
    assert "onnxruntime not installed" in finding.text
    assert finding.fix == "try: pip install 'nanovllm[onnx]'"


@pytest.mark.skipif(sys.platform == "win32", reason="the driver's program is played by a shell script")
def test_gpus_that_a_runtime_does_not_use_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia(tmp_path, monkeypatch, 'echo "NVIDIA T4, 7.5, 570"; echo "GeForce GTX 1080, 6.1, 570"')
    texts = {f.text: f for f in examined("onnx")}
    unused = texts["this ONNX Runtime does not use NVIDIA T4 (compute capability 7.5, driver 570)"]
    assert unused.fix is not None
    assert unused.fix.endswith("pip install 'nanovllm[onnx-cuda]'")
    assert any("GTX 1080" in text and "older than any that ONNX Runtime computes on (7.0" in text for text in texts)


def test_a_product_that_is_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm_runner_onnx import doctor

    class Session:
        def run(self, names: None, inputs: dict[str, Any]) -> list[Any]:
            return [0 * inputs["x"]]

    monkeypatch.setattr(doctor, "open_session", lambda model, settings: Session())
    [finding] = errors(examined("onnx"))
    assert finding.text == "a product of ones on cpu is 0.0 instead of 512"


def test_a_windows_that_is_too_old_for_directml_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getwindowsversion", lambda: SimpleNamespace(build=17763), raising=False)
    findings = examined("onnx", case(runner="onnx", **{"runner.device": "directml"}))
    assert any("build 18362 or later, and this is 17763" in f.text for f in findings if f.level == "warning")
    [finding] = errors(findings)
    assert finding.fix is not None
    assert "pip install 'nanovllm[onnx-directml]'" in finding.fix


# -------------------------------------------------------------------------------------------- torch


def test_torch_tells_its_build_and_the_types_that_it_computes_in() -> None:
    torch = pytest.importorskip("torch")
    build, product, kernels = examined("torch", case(runner="torch", **{"runner.threads": 1}))
    assert f"torch {torch.__version__}, built for" in build.text
    assert "a matrix product was computed on " in product.text
    assert "fp32" in kernels.text
    assert "`dtype: auto` takes" in kernels.text


@pytest.mark.skipif(sys.platform == "win32", reason="the driver's program is played by a shell script")
def test_a_torch_without_cuda_beside_a_gpu_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda:
        pytest.skip("this torch was built for CUDA")
    fake_nvidia(tmp_path, monkeypatch, 'echo "NVIDIA T4, 7.5, 570"')
    findings = examined("torch", case(runner="torch", **{"runner.device": "cuda"}))
    assert [f.level for f in findings] == ["ok", "warning", "error"]
    assert "T4" in findings[1].text
    assert "was built for the CPU only" in findings[1].text
    assert "runner.device is 'cuda'" in findings[2].text
    assert [f.level for f in examined("torch") if "T4" in f.text] == ["note"]


def test_a_torch_that_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nanovllm_runner_torch")
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    [finding] = examined("torch", case(runner="torch"))
    assert finding.level == "error"
    assert "torch cannot be imported (libcudart.so.12" in finding.text


def test_an_absent_torch_is_a_note_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nanovllm_runner_torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    [finding] = examined("torch")
    assert (finding.level, finding.fix) == ("note", "pip install 'nanovllm[torch]'")


def test_a_kernel_that_computes_wrongly_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from nanovllm_runner_torch import linear

    exact = linear.FloatLinear.__call__
    monkeypatch.setattr(linear.FloatLinear, "__call__", lambda self, x: 2 * exact(self, x))
    assert any("a product in fp32 on cpu is wrong by" in f.text for f in errors(examined("torch")))


# --------------------------------------------------------------------------------------------- http


def test_a_server_tells_what_it_speaks() -> None:
    with ScriptedServer(llama_server) as server:
        [_, finding] = examined("http", case(runner="http", **{"runner.url": server.url}))
    assert finding.level == "ok"
    assert f"{server.url}: speaks llamacpp" in finding.text


def test_a_server_that_is_not_there_is_an_error_and_one_of_several_a_warning() -> None:
    gone = "http://127.0.0.1:9"
    options = {"runner.retries": 0}
    [_, alone] = examined("http", case(runner="http", **{"runner.url": gone}, **options))
    assert alone.level == "error"
    assert gone in alone.text
    with ScriptedServer(llama_server) as server:
        [_, *both] = examined("http", case(runner="http", **{"runner.servers": [gone, server.url]}, **options))
    assert [f.level for f in both] == ["warning", "ok"]


def test_a_server_that_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm_runner_http.doctor.PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        [_, finding] = examined("http", case(runner="http", **{"runner.url": url}))
    assert finding.level == "error"
    assert url in finding.text


# --------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize(
    ("library", "chosen", "level", "fix"),
    [
        ("sentencepiece", None, "note", "pip install 'nanovllm-tokenizers[sentencepiece]'"),
        ("sentencepiece", "sentencepiece", "error", "pip install 'nanovllm-tokenizers[sentencepiece]'"),
        ("tokenizers", None, "error", "pip install 'nanovllm-tokenizers'"),
    ],
)
def test_an_absent_library_is_told(
    library: str, chosen: str | None, level: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    findings = examined("tokenizers", case(tokenizer=chosen) if chosen else NOTHING)
    [finding] = [f for f in findings if f.level != "ok"]
    assert (finding.level, finding.fix) == (level, fix)
    assert library in finding.text
    assert any("chat templates are rendered in a process of their own" in f.text for f in findings)


# ------------------------------------------------------------------------------------------- server


def serving(**options: Any) -> Case:
    return case(runner="mock", **{f"server.{key}": value for key, value in options.items()})


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    return path


def test_who_is_let_in_is_told(key_file: Path) -> None:
    texts = [f.text for f in examined("server", serving(host="0.0.0.0", api_key_file=str(key_file)))]
    assert "at 0.0.0.0 `serve` lets in those with one of 1 API keys" in texts
    assert any("without TLS the keys cross the network as they are" in text for text in texts)
    assert "at 127.0.0.1 `serve` lets in this machine" in [f.text for f in examined("server", serving())]


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes there")
def test_a_key_file_that_others_can_read_is_a_warning(key_file: Path) -> None:
    key_file.chmod(0o644)
    findings = examined("server", serving(api_key_file=str(key_file)))
    assert [(f.level, f.fix) for f in findings if f.fix] == [("warning", f"chmod 600 {key_file}")]


def test_a_key_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    good = REPO / "tests" / "tls_localhost.pem"
    [finding] = errors(examined("server", serving(tls_certificate=str(good), tls_key=str(tmp_path / "absent"))))
    assert "cannot be used: [Errno 2] No such file or directory" in finding.text


def test_certificates_are_tried(tmp_path: Path) -> None:
    good = REPO / "tests" / "tls_localhost.pem"
    assert errors(examined("server", serving(tls_certificate=str(good)))) == []
    bad = tmp_path / "bad.pem"
    bad.write_text("-----BEGIN CERTIFICATE-----\n")
    [finding] = errors(examined("server", serving(tls_certificate=str(bad))))
    assert f"server.tls_certificate {bad} cannot be used" in finding.text


# ------------------------------------------------------------------------------------------- models


def test_the_files_of_the_configured_model_are_looked_at(tmp_path: Path) -> None:
    shutil.copytree(package_directory(find("checkpoints", "demo")), tmp_path / "model")
    (tmp_path / "model" / "surprise.py").touch()
    findings = examined("models", case(model=str(tmp_path / "model")))
    assert findings[0].level == "ok"
    assert any("surprise.py is a program, and nothing in a model directory is ever run" in f.text for f in findings)
    tokenizer = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [{"id": 9999, "content": "<x>"}]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    [finding] = errors(examined("models", case(model=str(tmp_path / "model"))))
    assert "the tokenizer has 10000 entries but the model only 1500: they do not belong together" in finding.text
    assert finding.fix == "copy the tokenizer files that came with the model"


def test_a_model_without_files_is_not_looked_at() -> None:
    assert [f.level for f in examined("models", case(model="somewhere-else", runner="mock"))] == ["note"]
