"""What bf16 and int8 lose: no more than transformers in bf16, and than 8 bits must."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numpy_support
from model_cases import MODELS
from models_support import LLAMA, write_checkpoint
from nanovllm import LLM, SamplingParams
from reference_cases import CHECKPOINTS, cases
from support import REPO, needs_data
from test_numpy_parity import build, prompt, reference
from torch_support import Driver, device, fill, linear, make_runner, torch

needs_bf16 = pytest.mark.skipif(
    not (device.has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()), reason="a CPU that computes in bf16"
)
needs_int8 = pytest.mark.skipif(not device.has_onednn(), reason="oneDNN")


def divergence(logits: np.ndarray, wanted: np.ndarray) -> float:
    """Mean KL divergence from the wanted distributions, in nats."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (wanted, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def loss(logits: np.ndarray, tokens: list[int]) -> float:
    """Mean negative log-likelihood of each token after the first."""
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(logits[:-1]).double(), torch.tensor(tokens[1:])))


@needs_bf16
@pytest.mark.parametrize(
    "name",
    ["falcon-rw-alibi", "gemma2", "gpt2", "granite", "llama", "mistral-window", "olmo2", "phi", "qwen2", "qwen3"],
)
def test_bf16_is_no_further_from_float32_than_transformers_bf16(name, tmp_path):
    _, family, config = MODELS[name]
    model = build(family, tmp_path, **config)
    tokens = prompt(60)
    exact = reference(model, tokens)
    with torch.no_grad():
        theirs = model.bfloat16()(torch.tensor([tokens])).logits[0].float().numpy()
    ours = Driver(make_runner(tmp_path, dtype="bf16")).logits(tokens, chunk=25)

    def error(logits: np.ndarray) -> float:
        return float(np.sqrt(np.square(logits - exact).mean()))

    assert error(ours) < 1.1 * error(theirs)


@needs_bf16
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_rows_of_a_batch_keep_to_themselves(weights, tmp_path):
    """Poisoned blocks and company change a sequence by rounding only, in every precision."""
    runner = make_runner(write_checkpoint(tmp_path, LLAMA), dtype="bf16", weights=weights)
    tokens = [prompt(n, seed=n) for n in (3, 9, 30, 31)]
    alone = [Driver(runner).logits([t % 61 for t in text])[-1] for text in tokens]
    fill(runner, float("nan"))
    driver = Driver(runner, list(range(64))[::-1])
    work = [(i, [t % 61 for t in text]) for i, text in enumerate(tokens)]
    driver.step(*((i, text, 0, len(text) - 1, 0) for i, text in work))
    together = driver.step(*((i, text, len(text) - 1, len(text), 1) for i, text in work))
    np.testing.assert_allclose(together, alone, rtol=0, atol=0.15 * np.std(alone))


@needs_data
@needs_bf16
def test_the_accuracy_table(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    monkeypatch.setattr("sys.argv", ["torch_precision.py", str(CHECKPOINTS / "stories260k"),
                                     "--sequences", "2", "--tokens", "30", "--threads", "1"])  # fmt: skip
    importlib.import_module("torch_precision").main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["fp32", "bf16", "int8 and fp32", "int8 and bf16"]
    divergences = [float(row[3]) for row in rows]
    assert divergences[0] == 0 < divergences[1] < min(divergences[2:])
    assert rows[0][5] == "100.0%"


# ------------------------------------------------------------------------------------------------ int8


@needs_int8
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 70),
    out=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_int8_products_are_exact_integers_times_scales(rows, width, out, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(n, width, generator=generator) * 3 for n in (out, rows))
    x[0] *= 1e6  # its scale is nobody else's
    added = torch.randn(out, generator=generator) if bias else None
    integers, scales = linear.quantised(weight)
    assert integers.abs().amax(1).tolist() == [127] * out
    assert ((integers * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()
    got = linear.Int8Linear(integers.clone(), scales, added)(x)
    largest = x.abs().amax(-1, keepdim=True)
    row_integers = (x * (127 / largest)).round()
    wanted = (row_integers.double() @ integers.double().T) * (scales[None].double() / 127) * largest.double()
    wanted = wanted if added is None else wanted + added
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@needs_int8
def test_an_int8_row_is_bit_equal_alone_and_in_any_company():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(300, 200, generator=generator), torch.randn(129, 200, generator=generator)
    layer = linear.Int8Linear(*linear.quantised(weight), None)
    together = layer(x)
    for n in (1, 2, 8, 32, 128):
        assert torch.equal(layer(x[:n]), together[:n])


@needs_int8
def test_zeros_and_bad_rows_of_int8_are_their_own():
    x = torch.ones(4, 8)
    x[0], x[1, 3], x[2, 3] = 0, torch.nan, torch.inf
    y = linear.Int8Linear(*linear.quantised(torch.eye(8)), None)(x)
    assert torch.equal(y[0], torch.zeros(8))
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    torch.testing.assert_close(y[3], torch.ones(8))


@needs_data
@needs_bf16
@pytest.mark.parametrize("name", ["stories260k", "slm4096-gpt2"])
@pytest.mark.parametrize(
    ("options", "most"), [({"dtype": "bf16"}, 0.001), ({"dtype": "fp32", "weights": "int8"}, 0.003)]
)
def test_real_models_lose_little(name, options, most):
    """Mean divergence in nats, and the loss on the models' own text."""
    exact, found = numpy_support.make_runner(CHECKPOINTS / name), make_runner(CHECKPOINTS / name, **options)
    for case in cases(name):
        tokens = case["input_ids"] + case["greedy_new_ids"]
        wanted = numpy_support.Driver(exact).logits(tokens)
        got = Driver(found).logits(tokens)
        assert divergence(got, wanted) < most
        assert loss(got, tokens) < loss(wanted, tokens) + 0.02


@needs_bf16
@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"weights": "int8"}])
def test_the_demo_model_answers_alike_in_fewer_bits(options):
    questions = [f"What is the capital of {place}?" for place in ("France", "Peru", "Italy", "Japan")]
    answers = []
    for section in ({"type": "numpy"}, {"type": "torch", "device": "cpu"} | options):
        with LLM("demo", runner=section | {"threads": 1}) as llm:
            answers.append([o.text for o in llm.generate(questions, SamplingParams(temperature=0, max_tokens=16))])
    assert answers[0] == answers[1]
