"""int8 and int4 of the ONNX runner: against the definition of both in NumPy, their sizes, outliers, and refusals."""

from __future__ import annotations

import importlib
import json
import platform
from types import SimpleNamespace

import numpy as np
import pytest

from model_cases import MODELS, VOCAB
from models_support import GPT2, LLAMA, file_tensors, write_checkpoint
from nanovllm.errors import ConfigError, ModelError
from nanovllm_models import load_checkpoint
from nanovllm_runner_onnx.decoder import build_decoder
from nanovllm_runner_onnx.graph import Graph
from nanovllm_runner_onnx.linears import make_linears
from nanovllm_runner_onnx.options import OnnxOptions
from nanovllm_runner_onnx.precision import Precision, to_int4, to_int8
from nanovllm_runner_onnx.saturation import saturates
from nanovllm_runner_onnx.session import open_session, settings_of
from numpy_support import Driver
from onnx_support import make_runner, precision
from quantised_numpy import make_quantised
from support import DATA, REPO, needs_data

ort = pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

BLOCKS_128 = {"falcon-40b", "gpt2", "mixtral", "qwen2-tied-window", "qwen3"}  # one variant of each kind of block
CASES = [(name, p) for name in MODELS for p in ("int8", "int4")] + [(name, "int4-128") for name in sorted(BLOCKS_128)]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_family_computes_what_the_precision_is_defined_to_be(name, kind, tmp_path, monkeypatch):
    """To 1e-4, but where an activation lies so near the middle of two whole numbers that float32 rounding decides:
    that row then is another one by a step of 1/127. Most prompts have none."""
    model_type, _, config = MODELS[name]
    write_checkpoint(tmp_path, config | {"model_type": model_type})
    weights, _, block = kind.partition("-")
    oracle = Driver(make_quantised(tmp_path, weights, int(block or 32), monkeypatch))
    driver = Driver(make_runner(tmp_path, options=precision(kind)))
    prompts = np.random.default_rng(0).integers(0, VOCAB, (8, 4)).tolist()
    work = [(lane, tokens, 0, 4, 4) for lane, tokens in enumerate(prompts)]
    wanted = oracle.step(*work).reshape(8, -1)
    errors = np.abs(driver.step(*work).reshape(8, -1) - wanted).max(axis=1)
    assert np.median(errors) < 1e-4
    assert errors.max() < 0.25 * wanted.std()


@needs_data
@pytest.mark.parametrize(("kind", "nats"), [("int8", 0.004), ("int4", 0.2), ("int4-128", 0.25)])
@pytest.mark.parametrize("name", ["stories260k", "slm4096-gpt2"])
def test_a_real_model_says_nearly_the_same(name, kind, nats):
    """Mean divergence of the next token's distribution from that in float32, over the recorded prompts."""
    path = DATA / "checkpoints" / name
    cases = json.loads((path / "reference.json").read_text(encoding="utf-8"))["cases"]
    exact, quantised = Driver(make_runner(path)), Driver(make_runner(path, options=precision(kind)))
    divergences = []
    for case in cases:
        tokens = case["input_ids"] + case["greedy_new_ids"][:40]
        p, q = (log_softmax(driver.logits(tokens)) for driver in (exact, quantised))
        exact.tables.clear(), quantised.tables.clear()
        exact.free, quantised.free = list(range(64)), list(range(64))
        divergences += list((np.exp(p) * (p - q)).sum(axis=1))
    assert 0 < np.mean(divergences) < nats


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


# ------------------------------------------------------------------------------------------ whole numbers


def tensors(tmp_path, dtype=np.float32, **arrays):
    """Arrays as tensors of a file."""
    from safetensors.numpy import save_file

    from nanovllm_models.weights_file import open_weights

    save_file({name: array.astype(dtype) for name, array in arrays.items()}, tmp_path / "x.safetensors")
    return open_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("shape", [(5, 256), (70, 48), (3000, 100)])
def test_int4_is_what_onnx_runtimes_own_quantiser_gives(shape, block, tmp_path):
    quantise = pytest.importorskip("onnxruntime.capi._pybind_state").quantize_matmul_4bits
    w = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    w[1, :50] = 0
    num_out, num_in = shape
    num_blocks = -(-num_in // block)
    values, scales = np.zeros((num_out, num_blocks, block // 2), np.uint8), np.zeros((num_out, num_blocks), np.float32)
    columns = np.pad(w.T, ((0, num_blocks * block - num_in), (0, 0)))
    zero_points = np.zeros((num_out, (num_blocks + 1) // 2), np.uint8)
    quantise(values, np.ascontiguousarray(columns), scales, zero_points, block, num_out, num_in, True)
    found = to_int4([tensors(tmp_path, w=w)["w"]], block)
    np.testing.assert_array_equal(found.scales, scales)
    got, wanted = (v.reshape(num_out, -1) for v in (found.values, values))
    np.testing.assert_array_equal(got[:, : num_in // 2], wanted[:, : num_in // 2])
    assert (got[:, num_in // 2 :] == 0x88).all()  # padding stands for zeros


@pytest.mark.parametrize("tiny", [1e-45, 1e-39, -1e-39, 1e-30])
def test_numbers_that_are_as_good_as_zeros(tiny, tmp_path):
    """The inverse of the smallest ones is none."""
    w = tensors(tmp_path, w=np.full((2, 64), tiny))["w"]
    values, scales = to_int4([w], 32)
    number = np.stack([values & 15, values >> 4]).astype(np.float64) - 8
    assert np.abs(number * scales[:, :, None] - tiny).max() <= max(abs(tiny) / 100, 1e-38)
    values, scales = to_int8([w])
    assert np.abs(values.T * scales[:, None].astype(np.float64) - tiny).max() <= 1e-32


@pytest.mark.parametrize("transposed", [False, True])
def test_int8_rounds_to_the_nearest_of_255_steps(transposed, tmp_path):
    w = np.random.default_rng(0).standard_normal((600, 400), dtype=np.float32)
    w[7] = 0
    found = tensors(tmp_path, w=w.T.copy() if transposed else w)["w"]
    values, scales = to_int8([found.T if transposed else found])
    assert (values.shape, scales.shape) == ((400, 600), (600,))
    error = np.abs(values.T * scales[:, None].astype(np.float64) - w)
    assert (error <= scales[:, None] * 0.50001).all()
    np.testing.assert_array_equal(np.abs(values).max(axis=0), np.where(np.arange(600) == 7, 0, 127))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(kind, bad, tmp_path):
    broken = file_tensors(LLAMA)
    broken["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    write_checkpoint(tmp_path, LLAMA, broken)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf.*fp32"):
        make_runner(tmp_path, options=precision(kind))


# ------------------------------------------------------------------------------------- rows by themselves


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_outlier_in_one_sequence_costs_its_neighbours_nothing(kind, tmp_path):
    """With one scale for the batch, a row that is a million times larger would leave nothing of the others."""
    weights = file_tensors(GPT2)
    weights["transformer.wte.weight"][60] *= 1e6
    driver = Driver(make_runner(write_checkpoint(tmp_path, GPT2, weights), options=precision(kind)))
    calm = [1, 2, 3, 4, 5]
    alone = driver.step((0, calm, 0, 5, 5))
    beside = driver.step((1, calm, 0, 5, 5), (2, [60, 60, 60], 0, 3, 1))
    np.testing.assert_array_equal(beside[:5], alone)


@pytest.mark.parametrize("kind", ["int8", "int4", "int4-128"])
def test_rows_of_zeros_and_of_what_is_no_number_stay_their_own(kind, tmp_path):
    rng = np.random.default_rng(0)
    weights = tensors(tmp_path, w=rng.standard_normal((30, 100)), b=rng.standard_normal(30))
    g = Graph()
    g.input("x", np.float32, ["T", 100])
    weight_kind, _, block = kind.partition("-")
    linears = make_linears(g, weights, Precision(weight_kind, int(block or 32)), "cpu")
    g.output(linears.products("x", ["w"], ["b"])[0], np.float32, ["T", 30])
    session = open_session(g.model(), settings_of(OnnxOptions(), 1), g.weights)

    def run(x: np.ndarray) -> np.ndarray:
        return session.run(None, {"x": x})[0]

    x = rng.standard_normal((8, 100), dtype=np.float32)
    wanted, bias = run(x), weights["b"].array
    for value in (0.0, 1e-42, -3e38, np.inf, np.nan):
        rows = x.copy()
        rows[[1, 4], :] = 0
        rows[[1, 4], 33] = value
        y = run(rows)
        np.testing.assert_array_equal(np.delete(y, [1, 4], axis=0), np.delete(wanted, [1, 4], axis=0))
        np.testing.assert_array_equal(y[1], y[4])
        if abs(value) < 1e-30:
            np.testing.assert_allclose(y[1], bias, rtol=0, atol=1e-30)
        if np.isinf(value):
            assert not np.isfinite(y[1]).any()
    assert run(x[:0]).shape == (0, 30)


# --------------------------------------------------------------------------------------------------- sizes


def held(path, kind: str) -> dict[str, int]:
    weights, _, block = kind.partition("-")
    checkpoint = load_checkpoint(path)
    graph = build_decoder(checkpoint.spec, checkpoint.weights, 128, 4, Precision(weights, int(block or 32)))
    assert graph.weight_bytes == sum(a.nbytes for a in graph.weights.values())
    return {name: array.nbytes for name, array in graph.weights.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_sizes_are_in_proportion_to_the_bits(tied, tmp_path):
    """Of four bytes: int8 takes one and a scale for every output, int4 half of one and a scale for every block."""
    config = LLAMA | {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 500}
    write_checkpoint(tmp_path, config | {"tie_word_embeddings": tied})
    sizes = {kind: held(tmp_path, kind) for kind in ("fp32", "int8", "int4", "int4-128")}
    whole = sum(sizes["fp32"].values())
    for kind, share, scales in (("int8", 1 / 4, 1 / 256), ("int4", 1 / 8, 1 / 32), ("int4-128", 1 / 8, 1 / 128)):
        assert share * whole < sum(sizes[kind].values()) < 1.15 * (share + scales) * whole, kind


def test_int4_holds_an_embedding_that_is_the_output_matrix_too_once(tmp_path):
    """int8 does not: its product wants (in, out), of which a row cannot be looked up."""
    tied, untied = (LLAMA | {"tie_word_embeddings": is_tied, "vocab_size": 500} for is_tied in (True, False))
    write_checkpoint(tmp_path / "tied", tied)
    write_checkpoint(tmp_path / "untied", untied)
    for kind, copies in (("int4", 1), ("int8", 2)):
        sizes = [sum(held(tmp_path / name, kind).values()) for name in ("tied", "untied")]
        table = {"int4": 500 * (16 + 4), "int8": 500 * (24 + 4)}[kind]  # 24 numbers a row: one block of 32
        assert sizes[1] - sizes[0] == (2 - copies) * table


def test_what_is_not_a_matrix_stays_in_float32(tmp_path):
    model_type, _, config = MODELS["qwen2_moe"]
    path = write_checkpoint(tmp_path, config | {"model_type": model_type})
    checkpoint = load_checkpoint(path)
    for weights in ("int8", "int4"):
        graph = build_decoder(checkpoint.spec, checkpoint.weights, 64, 4, Precision(weights))
        floats = {name for name, a in graph.weights.items() if a.dtype == np.float32 and not name.endswith(".scales")}
        wholes = [name.removesuffix(".rows") for name, a in graph.weights.items() if a.dtype != np.float32]
        kinds = {part.split(".")[-2] for name in wholes for part in name.split("+")}
        assert kinds == {"tokens", "q", "k", "v", "out", "gate", "up", "down", "lm_head"}
        assert {"layers.0.mlp.router.weight", "layers.0.mlp.shared_gate.weight", "final_norm.weight"} <= floats


# --------------------------------------------------------------------------------------- this processor


def test_whether_products_of_8_bits_saturate_is_tried_out():
    assert not saturates(ort) or platform.machine().lower() in ("x86_64", "amd64")
    # Pairs of products added up in 16 bits, as processors before VNNI do it: 32 pairs of 64 numbers.
    session = SimpleNamespace(run=lambda _, inputs: [np.full((1, 64), 32 * 32767)])
    fake = SimpleNamespace(SessionOptions=ort.SessionOptions, InferenceSession=lambda *_, **__: session)
    assert saturates(fake)


# ------------------------------------------------------------------------------------------------ refusals


def test_fp16_on_a_cpu_is_refused_with_what_to_use_instead(tmp_path):
    with pytest.raises(ConfigError, match=r"weights: fp16 is not for the cpu.*int8 or fp32"):
        make_runner(write_checkpoint(tmp_path, LLAMA), options=precision("fp16"))


# ----------------------------------------------------------------------------------------------- benchmark


@needs_data
def test_the_accuracy_table(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    monkeypatch.setattr("sys.argv", ["onnx_precision.py", str(DATA / "checkpoints" / "stories260k"),
                                     "--sequences", "2", "--tokens", "30", "--threads", "1"])  # fmt: skip
    importlib.import_module("onnx_precision").main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["fp32", "int8", "int4, block 32", "int4, block 128"]
    divergences = [float(row[3]) for row in rows]
    assert divergences[0] == 0 < divergences[1] < divergences[2]
    assert rows[0][5] == "100.0%"
