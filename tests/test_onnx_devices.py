"""The graphs for CUDA and DirectML: every node against the provider's kernels, and what they compute.

No such device is here. What is checked: operators, operator sets, types and arities against ONNX Runtime's schemas and
the providers' tables; the numbers, with the CPU in the role of the device (onnx_devices.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import numpy_support
from model_cases import GPT2, LLAMA, MODELS, QWEN3, WINDOW
from models_support import file_tensors, write_checkpoint
from nanovllm.errors import ConfigError, ModelError, RunnerError, UnsupportedModelError
from nanovllm_models import DecoderSpec, Experts, load_checkpoint
from nanovllm_runner_onnx.decoder import build_decoder
from nanovllm_runner_onnx.device_limits import check_limits
from nanovllm_runner_onnx.precision import Precision
from numpy_support import Driver
from onnx_devices import make_device_runner
from onnx_kernels import KERNELS

ort = pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")
pytestmark = pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 29), reason="PagedAttention has slots from 1.29 on"
)

PRECISIONS = {"cuda": ("fp16", "int4"), "directml": ("fp32", "fp16", "int4")}
WITH_PRECISION = [(device, weights) for device, choices in PRECISIONS.items() for weights in choices]


@pytest.fixture(scope="module")
def schemas() -> dict[tuple[str, str], list]:
    from onnxruntime.capi._pybind_state import get_all_operator_schema

    found: dict[tuple[str, str], list] = {}
    for schema in get_all_operator_schema():
        found.setdefault((schema.domain, schema.name), []).append(schema)
    return found


def check_graph(model: onnx.ModelProto, device: str, schemas) -> set[tuple[str, str]]:
    """Types of every value by the schemas; each node's schema, types and arity; the kernel. The operators used."""
    [opset] = [o.version for o in model.opset_import if not o.domain]
    names = {code: name.lower() for name, code in onnx.TensorProto.DataType.items()}
    types = {i.name: names[i.type.tensor_type.elem_type] for i in model.graph.input}
    types |= {t.name: names[t.data_type] for t in model.graph.initializer}
    used = set()
    for node in model.graph.node:
        key = (node.domain, node.op_type)
        used.add(key)
        limit = opset if not node.domain else 1
        schema = max((s for s in schemas[key] if s.since_version <= limit), key=lambda s: s.since_version)
        assert schema.min_input <= len(node.input) <= schema.max_input, node
        assert schema.min_output <= len(node.output) <= schema.max_output, node
        assert {a.name for a in node.attribute} <= set(schema.attributes), node
        assert {n for n, a in schema.attributes.items() if a.required} <= {a.name for a in node.attribute}, node

        allowed = {t.type_param_str: t.allowed_type_strs for t in schema.type_constraints}
        bound: dict[str, str] = {}
        for i, name in enumerate(node.input):
            kind = schema.inputs[min(i, len(schema.inputs) - 1)].typeStr
            if not name:
                continue
            if kind in allowed:
                assert bound.setdefault(kind, types[name]) == types[name], (node, kind)
            else:
                assert kind == f"tensor({types[name]})", node
        if node.op_type == "Cast":
            bound["T2"] = names[node.attribute[0].i]
        for i, name in enumerate(node.output):
            kind = schema.outputs[min(i, len(schema.outputs) - 1)].typeStr
            if kind in allowed and kind not in bound:
                assert len(allowed[kind]) == 1, (node, kind)
                bound[kind] = allowed[kind][0].removeprefix("tensor(").removesuffix(")")
            types[name] = bound.get(kind) or kind.removeprefix("tensor(").removesuffix(")")
        for kind, name in bound.items():
            assert f"tensor({name})" in allowed[kind], (node, kind)

        version, kernel = KERNELS[device][key]
        assert schema.since_version == version, (node, schema.since_version)
        for kind, name in bound.items():
            assert kind not in kernel or name in kernel[kind].split(), (node, kind, name)
    for output in model.graph.output:
        assert types[output.name] == names[output.type.tensor_type.elem_type]
    return used


def refusal(spec: DecoderSpec, device: str) -> str | None:
    """What the message says where a device is not to take the model."""
    if any(isinstance(mlp, Experts) for mlp in spec.mlps):
        return "no mixture of experts"
    if device == "cuda" and spec.attention.alibi is not None:
        return "no attention with ALiBi"
    if device == "cuda" and spec.attention.head_size % 8:
        return "heads of a multiple of 8"
    return None


@pytest.mark.parametrize("name", MODELS)
def test_every_node_has_a_kernel(name, tmp_path, schemas):
    """All families and variants: the graph is such that the provider has a kernel for every node, or it is refused."""
    model_type, _, config = MODELS[name]
    checkpoint = load_checkpoint(write_checkpoint(tmp_path, config | {"model_type": model_type}))
    for device, weights in WITH_PRECISION:
        if refusal(checkpoint.spec, device):
            continue
        graph = build_decoder(checkpoint.spec, checkpoint.weights, 64, 16, Precision(weights), device)
        model = onnx.ModelProto.FromString(graph.model())
        used = check_graph(model, device, schemas)
        attention = [node for node in model.graph.node if node.op_type == "PagedAttention"]
        assert len(attention) == (checkpoint.spec.num_layers if device == "cuda" else 0)
        assert not {op for _, op in used} & {"GroupQueryAttention", "MultiHeadAttention", "Attention"}
        floats = {i.type.tensor_type.elem_type for i in model.graph.input if i.name.startswith(("k.", "v."))}
        assert floats == {onnx.TensorProto.FLOAT if weights == "fp32" else onnx.TensorProto.FLOAT16}
        assert all(w.dtype != np.float32 for w in graph.weights.values()) or weights == "fp32"


def test_the_check_finds_what_a_provider_lacks(tmp_path, schemas):
    """The CPU's graph of the same model is no graph for either device."""
    checkpoint = load_checkpoint(write_checkpoint(tmp_path, GPT2 | {"model_type": "gpt2"}))
    model = onnx.ModelProto.FromString(build_decoder(checkpoint.spec, checkpoint.weights, 30, 16).model())
    for device in KERNELS:
        with pytest.raises((AssertionError, KeyError)):
            check_graph(model, device, schemas)


# ------------------------------------------------------------------------------------------ what they compute

GPT2_OF_8 = GPT2 | {"n_head": 6}  # heads of 8, of which CUDA's operator wants a multiple
QUANTISED = {"gpt2": GPT2_OF_8, "llama": LLAMA, "qwen2": LLAMA | WINDOW, "qwen3": QWEN3}


@pytest.mark.parametrize(("device", "weights"), [("cuda", "fp16"), ("directml", "fp32")])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_of_a_family(name, device, weights, tmp_path, monkeypatch):
    model_type, _, config = MODELS[name]
    path = write_checkpoint(tmp_path, (GPT2_OF_8 if name == "gpt2" else config) | {"model_type": model_type})
    reason = refusal(load_checkpoint(path).spec, device)
    if reason:
        with pytest.raises(UnsupportedModelError, match=reason):
            make_device_runner(monkeypatch, path, device)
        return
    compare(path, *make_device_runner(monkeypatch, path, device, weights=weights), 1e-4 if weights == "fp32" else 0.02)


@pytest.mark.parametrize("device", ["cuda", "directml"])
@pytest.mark.parametrize("model_type", QUANTISED)
def test_numbers_of_int4(model_type, device, tmp_path, monkeypatch):
    """Of weights that four bits and a scale hold exactly. The CPU, in the role of DirectML, also rounds activations."""
    config = QUANTISED[model_type] | {"model_type": model_type}
    tensors = {name: on_grid(name, array, model_type) for name, array in file_tensors(config).items()}
    path = write_checkpoint(tmp_path, config, tensors)
    runner, pools = make_device_runner(monkeypatch, path, device, weights="int4")
    compare(path, runner, pools, 0.02 if device == "cuda" else 0.1)


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2"])
def test_numbers_of_directml_in_float16(model_type, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, QUANTISED[model_type] | {"model_type": model_type})
    compare(path, *make_device_runner(monkeypatch, path, "directml"), 0.02)


def compare(path: Path, runner, pools, tolerance: float) -> None:
    """With the NumPy runner: a prompt whole and in chunks, a chunk beside a decode, a step that wants no logits,
    a shared prefix; over blocks in reverse order that hold NaN. `tolerance` of the root mean square, in deviations
    of the logits, which are large and of random weights: float16 loses more of them than of a real model's."""
    reference = Driver(numpy_support.make_runner(path, block_size=16, num_blocks=32))
    rng = np.random.default_rng(0)
    long, short = (rng.integers(0, runner.info.vocab_size, n).tolist() for n in (27, 5))
    branch = long[:16] + short  # on a whole block
    wanted, wanted_short, wanted_branch = (reference.logits(t, lane) for lane, t in enumerate((long, short, branch)))
    assert 0.1 < wanted.std() < 1e3

    def equal(got, *rows):
        error = got - np.concatenate(rows)
        assert np.sqrt((error**2).mean()) <= tolerance * wanted.std()
        assert np.abs(error).max() <= 10 * tolerance * wanted.std()

    for pool in pools:  # all blocks but the spare one
        pool.reshape(33, -1)[:32] = np.nan
    equal(Driver(runner).logits(long), wanted)
    equal(Driver(runner).logits(long, chunk=7), wanted)
    driver = Driver(runner, list(range(32))[::-1])
    driver.step((0, long, 0, 20, 0), (1, short, 0, 4, 0))
    equal(driver.step((0, long, 20, 27, 7), (1, short, 4, 5, 1)), wanted[20:], wanted_short[4:])
    driver.tables[2] = driver.tables[0][:1]
    equal(driver.step((2, branch, 16, 20, 4)), wanted_branch[16:20])
    decoded = driver.step((2, branch, 20, 21, 1), (0, long, 26, 27, 1), (1, short, 4, 5, 1))
    equal(decoded, wanted_branch[20:], wanted[26:], wanted_short[4:])


def on_grid(name: str, array: np.ndarray, model_type: str, block: int = 32) -> np.ndarray:
    """The nearest matrix of which int4 loses nothing; vectors and positions as they are."""
    if array.ndim < 2 or "wpe" in name:
        return array
    is_transposed = model_type == "gpt2" and "wte" not in name
    rows = array.T if is_transposed else array
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % block))).reshape(len(rows), -1, block)
    peaks = np.take_along_axis(padded, np.abs(padded).argmax(-1, keepdims=True), -1)
    scales = (peaks / -8).astype(np.float16).astype(np.float32)
    values = (np.clip(np.rint(padded / scales), -8, 7) * scales).reshape(len(rows), -1)[:, : rows.shape[1]]
    return np.ascontiguousarray(values.T if is_transposed else values)


def test_directml_takes_turns_with_two_pools_and_a_failed_step_changes_nothing(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, LLAMA | {"model_type": "llama"})
    runner, pools = make_device_runner(monkeypatch, path, "directml", weights="fp32")
    assert len(pools) == 2 * 2 * 2  # layers, K and V, copies
    assert runner.info.description["kv_bytes"] == sum(pool.nbytes for pool in pools)
    tokens, alone = [5, 6, 7, 8], Driver(runner, [3])
    wanted = Driver(numpy_support.make_runner(path)).logits(tokens)
    alone.step((0, tokens, 0, 2, 0))
    with pytest.raises(RunnerError):
        Driver(runner, [4]).step((0, [1, 99], 0, 2, 1))  # no such token
    np.testing.assert_allclose(alone.step((0, tokens, 2, 4, 2)), wanted[2:], atol=1e-4)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("device", "options", "reason"),
    [
        ("cuda", {"weights": "int8"}, "int8 is not for cuda.*no products of our kind.*int4 or fp16"),
        ("directml", {"weights": "int8"}, "int8.*directml"),
        ("cuda", {"weights": "fp32"}, "fp32 is not for cuda, where paged attention computes in fp16"),
    ],
)
def test_precisions_that_a_device_lacks(device, options, reason, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=reason):
        make_device_runner(monkeypatch, write_checkpoint(tmp_path, LLAMA | {"model_type": "llama"}), device, **options)


@pytest.mark.parametrize("name", ["falcon-rw-alibi", "mixtral"])
def test_a_model_that_a_device_cannot_express_does_not_fall_back(name, tmp_path, monkeypatch):
    """A fallback is for a device that is not there. Of what the device will never run, the user shall know."""
    model_type, _, config = MODELS[name]
    path = write_checkpoint(tmp_path, config | {"model_type": model_type})
    with pytest.raises(UnsupportedModelError, match=r"device: cuda has no .*; choose device: cpu"):
        make_device_runner(monkeypatch, path, "cuda", fallback=["cpu"])


@pytest.mark.parametrize("block_size", [8, 24])
def test_blocks_that_cuda_cannot_have(block_size, tmp_path):
    spec = load_checkpoint(write_checkpoint(tmp_path, LLAMA | {"model_type": "llama"})).spec
    with pytest.raises(ConfigError, match=rf"block_size is {block_size}, but .* a power of two from 16"):
        check_limits(spec, "cuda", block_size)
    check_limits(spec, "directml", block_size)


def test_weights_beyond_float16_are_an_error_that_names_them(tmp_path, monkeypatch):
    config = LLAMA | {"model_type": "llama"}
    tensors = file_tensors(config)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up\.weight has numbers beyond float16"):
        make_device_runner(monkeypatch, write_checkpoint(tmp_path, config, tensors), "cuda")
