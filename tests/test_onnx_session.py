"""Options, devices, fallback, threads and installations of the onnx runner. No device but the CPU is here."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from packaging.version import Version
from pydantic import ValidationError

from models_support import LLAMA, write_checkpoint
from nanovllm import LLM, SamplingParams
from nanovllm.components import choose
from nanovllm.config import leaves, load
from nanovllm.errors import ConfigError, ModelError, PluginError
from nanovllm_models import load_checkpoint
from nanovllm_runner_onnx.graph import Graph
from nanovllm_runner_onnx.install import OLDEST, pip_line
from nanovllm_runner_onnx.options import OnnxOptions
from nanovllm_runner_onnx.session import SessionSettings, facts, open_session, settings_of
from nanovllm_runner_onnx.session_options import provider_options, session_options
from nanovllm_runner_onnx.weights import IN_PLACE
from numpy_support import Driver
from onnx_support import make_runner

ort = pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", LLAMA)


new_enough_for_devices = pytest.mark.skipif(
    Version(ort.__version__) < OLDEST["cuda"], reason="an older ONNX Runtime is refused for that before all else"
)


def settings(**options) -> SessionSettings:
    return settings_of(OnnxOptions(**options), 1)


def product(size: int = 4) -> bytes:
    """y = x @ w, with w inside."""
    w = onnx.numpy_helper.from_array(np.eye(size, dtype=np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "the_product")], "g", [x], [y], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("said", "device", "fallback"),
    [
        ({}, "cpu", []),
        ({"device": "CUDA"}, "cuda", []),
        ({"device": "dml"}, "directml", []),
        ({"device": "DmlExecutionProvider", "fallback": ["CPU"]}, "directml", ["cpu"]),
        ({"providers": ["CUDA", "CPU"]}, "cuda", ["cpu"]),
        ({"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}, "cuda", ["cpu"]),
        ({"providers": ["cpu"]}, "cpu", []),
        ({"providers": ["DirectML"]}, "directml", []),
        ({"providers": ["cuda", "cpu"], "device": "cuda", "fallback": ["CPU"]}, "cuda", ["cpu"]),
    ],
)
def test_device_in_every_spelling(said, device, fallback):
    options = OnnxOptions(**said)
    assert (options.device, options.fallback) == (device, fallback)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"device": "gpu"}, "'cpu', 'cuda' or 'directml'"),
        ({"fallback": ["cuda"]}, "fallback.0.*Input should be 'cpu'"),
        ({"providers": []}, "at least 1 item"),
        ({"providers": ["tensorrt", "cpu"]}, "device.*'cpu', 'cuda' or 'directml'"),
        ({"providers": ["cpu", "cuda"]}, "fallback.0.*Input should be 'cpu'"),
        ({"providers": ["cuda"], "device": "cpu"}, "device: cpu contradicts providers: .*cuda"),
        ({"providers": ["cuda"], "fallback": ["cpu"]}, r"fallback: \['cpu'\] contradicts providers"),
        ({"provider": ["cpu"]}, "provider"),
        ({"weights": "fp64"}, "'fp32', 'fp16', 'int8' or 'int4'"),
        ({"weights": "int4", "int4_block": 64}, "32 or 128"),
        ({"weights": "int8", "int4_block": 32}, "int4_block means something only with weights: int4"),
        ({"spinning": "no"}, "boolean"),
    ],
)
def test_bad_options(said, reason):
    with pytest.raises(ValidationError, match=rf"(?s){reason}"):
        OnnxOptions(**said)


def test_options_arrive_from_the_configuration(path):
    with pytest.raises(ConfigError, match=r"runner\.device.*gpu"):
        LLM(str(path), runner={"type": "onnx", "device": "gpu"})
    runner = {"type": "onnx", "threads": 1, "providers": ["CPU"], "spinning": False}
    with LLM("demo", runner=runner) as llm, LLM("demo", runner="numpy") as numpy:
        params = SamplingParams(temperature=0, max_tokens=12)
        texts = [engine.generate(["Once upon", "The"], params) for engine in (llm, numpy)]
        assert [o.text for o in texts[0]] == [o.text for o in texts[1]]
        shown = llm.info.description
        assert (shown["threads"], shown["device"], shown["providers"]) == (1, "cpu", ["CPUExecutionProvider"])
        assert "fallback" not in shown


def test_names_with_dots_arrive_from_a_file_and_a_flag(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "runner:\n  type: onnx\n  session_options: {session.set_denormal_as_zero: true, enable_mem_pattern: false}\n",
        encoding="utf-8",
    )
    wished = load(file, environ={}, sets=["runner.session_options.session.intra_op.spin_duration_us=100"])
    assert choose(wished, None).runner_options.session_options == {
        "session.set_denormal_as_zero": True,
        "session.intra_op.spin_duration_us": 100,
        "enable_mem_pattern": False,
    }
    assert choose(load(environ={}, overrides=dict(leaves(wished.config))), None).runner_options == (
        choose(wished, None).runner_options
    )


# ---------------------------------------------------------------------------------------------- devices


@new_enough_for_devices
@pytest.mark.parametrize("device", ["cuda", "directml"])
def test_a_device_that_is_not_there_is_an_error_that_lists_those_that_are(device, path):
    with pytest.raises(ConfigError, match=rf"device is {device}.*available: cpu.*nanovllm\[onnx-{device}\]"):
        make_runner(path, options=OnnxOptions(device=device))


@new_enough_for_devices
@pytest.mark.parametrize("device", ["cuda", "directml"])
def test_only_an_allowed_fallback_is_taken_and_it_is_logged_and_shown(device, path, caplog):
    with caplog.at_level(logging.WARNING, "nanovllm_runner_onnx"):
        runner = make_runner(path, options=OnnxOptions(device=device, fallback=["cpu"]))
    assert f"runner.device is {device}" in caplog.text
    assert "runner.fallback allows" in caplog.text
    shown = runner.info.description
    assert (shown["device"], shown["weights"]) == ("cpu", "fp32")
    assert f"runner.device is {device}" in shown["fallback"]
    rows = Driver(runner).logits([5, 6, 7])
    np.testing.assert_array_equal(rows, Driver(make_runner(path)).logits([5, 6, 7]))


def test_a_session_that_runs_elsewhere_than_asked_is_an_error(monkeypatch):
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: ["OtherProvider"])
    with pytest.raises(ConfigError, match="runs on OtherProvider where CPUExecutionProvider was asked for"):
        open_session(product(), settings())


@pytest.fixture
def pretended(monkeypatch):
    """An ONNX Runtime that lists CUDA, cannot create it, and goes on without a word, as the real one does."""
    real = ort.InferenceSession

    def quiet(model, options, providers, enable_fallback):
        assert (enable_fallback, providers[0][0]) == (0, "CUDAExecutionProvider")
        return real(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", quiet)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load a library"))
    return real


@new_enough_for_devices
def test_a_provider_that_onnxruntime_drops_in_silence_is_found_before_a_graph_is_built(pretended, capsys):
    with pytest.raises(ConfigError, match=r"runs on CPUExecutionProvider where CUDAExecutionProvider.*stderr"):
        settings(device="cuda")
    assert capsys.readouterr() == ("", "Failed to load a library\n")  # stdout is for answers
    assert settings(device="cuda", fallback=["cpu"]).device == "cpu"


class PartlyOnTheCpu:
    """A session on CUDA that left these nodes to the CPU."""

    def __init__(self, *kinds: str) -> None:
        nodes = [SimpleNamespace(op_type=kind) for kind in kinds]
        self.parts = [SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)]

    def __call__(self, model, options, providers, enable_fallback):
        assert options.get_session_config_entry("session.record_ep_graph_assignment_info") == "1"
        return self

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self):
        return self.parts


@new_enough_for_devices
def test_heavy_nodes_left_to_the_cpu_are_an_error_that_names_them(monkeypatch, caplog):
    on_cuda = replace(settings(), device="cuda")
    monkeypatch.setattr(ort, "InferenceSession", PartlyOnTheCpu("Shape", "Gather", "Concat", "Squeeze"))
    open_session(product(), on_cuda)  # arithmetic on shapes belongs there

    monkeypatch.setattr(ort, "InferenceSession", PartlyOnTheCpu("Shape", "MatMul", "Softmax", "MatMul"))
    with pytest.raises(ConfigError, match=r"cuda has no kernel.*2 MatMul, 1 Softmax.*fallback: \[cpu\]"):
        open_session(product(), on_cuda)
    with caplog.at_level(logging.WARNING, "nanovllm_runner_onnx"):
        session = open_session(product(), replace(on_cuda, fallback=("cpu",)))
    assert "2 MatMul" in caplog.text
    assert facts(on_cuda, session)["device"] == "cuda"


@pytest.mark.skipif(not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"), reason="ORT before 1.24")
def test_what_onnxruntime_says_of_its_nodes_is_what_is_read():
    """The names that the check relies on, on the one provider that is here."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(product(), options, providers=["CPUExecutionProvider"])
    nodes = [(p.ep_name, n.op_type) for p in session.get_provider_graph_assignment_info() for n in p.get_nodes()]
    assert nodes == [("CPUExecutionProvider", "MatMul")]


# ------------------------------------------------------------------------- session and provider options


def test_session_options_arrive():
    options = session_options(
        {
            "graph_optimization_level": "basic", "execution_mode": "SEQUENTIAL", "inter_op_num_threads": 2,
            "enable_mem_pattern": False, "session.set_denormal_as_zero": True, "session.dynamic_block_base": 4,
        }
    )  # fmt: skip
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL
    assert (options.inter_op_num_threads, options.enable_mem_pattern) == (2, False)
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"
    assert options.get_session_config_entry("session.dynamic_block_base") == "4"
    assert provider_options("cuda", {"device_id": 1, "use_tf32": False}) == {"device_id": "1", "use_tf32": "0"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"graph_optimisation_level": "all"}, "no option 'graph_optimisation_level'; known: graph_optimization_level"),
        ({"session.dynamic_blok_base": "4"}, "known: session.dynamic_block_base"),
        ({"graph_optimization_level": "most"}, "cannot be 'most'; it is one of disable_all, basic, extended"),
        ({"inter_op_num_threads": "2"}, "cannot be '2'; it is a whole number"),
        ({"enable_mem_reuse": 1}, "cannot be 1; it is true or false"),
        ({"intra_op_num_threads": 2}, "intra_op_num_threads is set by runner.threads"),
        ({"session.intra_op.allow_spinning": "0"}, "use runner.spinning"),
    ],
)
def test_unknown_session_options_are_never_ignored(options, reason):
    with pytest.raises(ConfigError, match=rf"runner.session_options: .*{reason}"):
        settings(session_options=options)


@new_enough_for_devices
@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [
        ("cpu", {"device_id": 0}, "no option 'device_id' of cpu; it has none"),
        ("cuda", {"gpu_mem_limt": 3}, "no option 'gpu_mem_limt' of cuda; known: gpu_mem_limit"),
        ("directml", {"gpu_mem_limit": 3}, "known: .*device_id.*performance_preference"),
    ],
)
def test_unknown_provider_options_are_an_error_even_where_a_fallback_is_allowed(device, options, reason):
    with pytest.raises(ConfigError, match=rf"runner.provider_options: .*{reason}"):
        settings(device=device, fallback=["cpu"], provider_options=options)


@pytest.mark.parametrize("spinning", [True, False])
def test_spinning_reaches_the_session(spinning):
    session = open_session(product(), settings(spinning=spinning))
    options = session.get_session_options()
    if spinning:
        assert 0 < int(options.get_session_config_entry("session.intra_op.spin_duration_us")) <= 1000
    else:
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_a_user_may_override_our_defaults():
    session = open_session(product(), settings(session_options={"enable_mem_pattern": True}))
    assert session.get_session_options().enable_mem_pattern


def test_custom_operators_only_of_files_that_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"custom_ops names .*ops\.so, which is not a file"):
        settings(custom_ops=[str(tmp_path / "ops.so")])
    (tmp_path / "ops.so").write_bytes(b"not a library")
    with pytest.raises(ConfigError, match=r"ops\.so cannot be loaded"):
        open_session(product(), settings(custom_ops=[str(tmp_path / "ops.so")]))


# ------------------------------------------------------------------------------------- models and weights


def test_a_model_may_be_a_file_or_bytes(tmp_path):
    (tmp_path / "model.onnx").write_bytes(product())
    x = np.ones((2, 4), np.float32)
    for model in (product(), tmp_path / "model.onnx"):
        np.testing.assert_array_equal(open_session(model, settings()).run(None, {"x": x})[0], x)
    (tmp_path / "model.onnx").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"refuses .*model\.onnx"):
        open_session(tmp_path / "model.onnx", settings())


def test_a_refusal_that_the_users_options_may_have_caused_says_so():
    with pytest.raises(ModelError, match=r"refuses the graph: .*severity.*try it without runner.session_options"):
        open_session(product(), settings(session_options={"log_severity_level": 99}))


def test_mapped_weights_are_read_in_place_and_live_as_long_as_the_session(path):
    """Weights of a float32 file are handed over as they are mapped, others copied; both give the same numbers."""
    weights = load_checkpoint(path).weights
    mapped = weights["layers.0.attn.q.weight"].array
    own = np.arange(8, dtype=np.float32)
    g = Graph()
    x = g.input("x", np.float32, ["n", mapped.shape[1]])
    rows = g.op("Gather", g.weight("table", mapped), g.constant([0, 3]), axis=0)
    g.output(g.op("MatMul", x, g.op("Transpose", rows, perm=[1, 0]), name="y"), np.float32, ["n", 2])
    g.output(g.op("Identity", g.weight("own", own), name="z"), np.float32, [8])
    session = open_session(g.model(), settings(), g.weights)
    assert set(session.weights) == ({"table"} if Version(ort.__version__) >= IN_PLACE else set())
    expected, data = mapped[[0, 3]].T.copy(), np.random.default_rng(0).standard_normal((5, mapped.shape[1]))
    del weights, mapped, g
    for _ in range(2):
        y, z = session.run(None, {"x": data.astype(np.float32)})
        np.testing.assert_allclose(y, data @ expected, atol=1e-5)
        np.testing.assert_array_equal(z, own)


# ------------------------------------------------------------------------------------------ installations


@pytest.fixture
def installed(monkeypatch):
    """Call it with the names of the distributions that are to be found."""

    def pretend(*names: str) -> None:
        def version(name: str) -> str:
            if name not in names:
                raise metadata.PackageNotFoundError(name)
            return "1.31.1"

        monkeypatch.setattr(metadata, "version", version)

    return pretend


def test_two_distributions_at_once_are_an_error_on_a_device_and_a_warning_on_the_cpu(installed, caplog):
    installed("onnxruntime", "onnxruntime-gpu")
    remedy = r"pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'nanovllm\[onnx-cuda\]'"
    with pytest.raises(PluginError, match=rf"onnxruntime and onnxruntime-gpu are installed together.*{remedy}"):
        settings(device="cuda")
    with caplog.at_level(logging.WARNING, "nanovllm_runner_onnx"):
        facts(settings(), open_session(product(), settings()))
    assert caplog.text.count("pip install 'nanovllm[onnx]'") == 2  # once for each time that settings are made
    fallen = settings(device="cuda", fallback=["cpu"])
    assert fallen.device == "cpu"
    assert "installed together" in fallen.fell_back


@pytest.mark.parametrize("device", ["cpu", "cuda", "directml"])
def test_without_onnxruntime_the_remedy_is_said(device, installed, monkeypatch):
    installed()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    extra = "onnx" if device == "cpu" else f"onnx-{device}"
    with pytest.raises(PluginError, match=rf"onnxruntime not installed.*try: pip install 'nanovllm\[{extra}\]'"):
        settings(device=device)


def test_another_distribution_must_go_first(installed):
    installed("onnxruntime")
    assert pip_line("cuda") == "pip uninstall -y onnxruntime && pip install 'nanovllm[onnx-cuda]'"


@pytest.mark.parametrize("device", ["cpu", "cuda", "directml"])
def test_an_onnxruntime_that_is_too_old_says_which_is_needed(device, monkeypatch):
    monkeypatch.setattr(ort, "__version__", "1.22.1")
    with pytest.raises(PluginError, match=rf"1\.22\.1 is too old.*needs {OLDEST[device]}.*pip install --upgrade"):
        settings(device=device)
    with pytest.raises(PluginError, match="too old for device: cpu"):  # for which it is too old as well
        settings(device=device, fallback=["cpu"])


# ------------------------------------------------------------------------------------------------ threads
