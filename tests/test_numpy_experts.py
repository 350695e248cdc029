"""The mixture of experts: routing, ties, and rows that do not know of each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm_models import Experts, FeedForward
from nanovllm_runner_numpy.feed_forward import Dense, Mixture
from nanovllm_runner_numpy.linear import LinearWeights

HIDDEN, SIZE = 6, 5


def feed_forward(rng: np.random.Generator) -> Dense:
    spec = FeedForward(size=SIZE, activation="silu", gated=True, bias=False)
    gate_up, down = (rng.standard_normal(s, dtype=np.float32) for s in ((HIDDEN, 2 * SIZE), (SIZE, HIDDEN)))
    return Dense(spec, LinearWeights(gate_up, None), LinearWeights(down, None))


def mixture(num_experts: int, top_k: int, *, normalised: bool, shared: bool, seed: int = 0) -> Mixture:
    rng = np.random.default_rng(seed)
    router = LinearWeights(rng.standard_normal((HIDDEN, num_experts), dtype=np.float32), None)
    experts = tuple(feed_forward(rng) for _ in range(num_experts))
    extra = feed_forward(rng) if shared else None
    spec = Experts(
        num_experts=num_experts,
        top_k=top_k,
        normalised=normalised,
        expert=experts[0].spec,
        shared=None if extra is None else extra.spec,
    )
    gate = LinearWeights(rng.standard_normal((HIDDEN, 1), dtype=np.float32), None) if shared else None
    return Mixture(spec, router, experts, extra, gate)


def run(mix: Mixture, h: np.ndarray) -> np.ndarray:
    return mix(h, np.empty(len(h) * mix.width, np.float32))


def by_the_book(mix: Mixture, row: np.ndarray) -> np.ndarray:
    """spec.py's formula for one token, in float64 and Python loops."""

    def passed(mlp: Dense) -> np.ndarray:
        inner = row @ mlp.gate_up.weight.astype(np.float64)
        gate, up = inner[:SIZE], inner[SIZE:]
        return (gate / (1 + np.exp(-gate)) * up) @ mlp.down.weight.astype(np.float64)

    exps = np.exp(row @ mix.router.weight.astype(np.float64))
    p = exps / exps.sum()
    best = sorted(range(len(p)), key=lambda e: (-p[e], e))[: mix.spec.top_k]
    total = sum(p[e] for e in best) if mix.spec.normalised else 1.0
    out = sum(p[e] / total * passed(mix.experts[e]) for e in best)
    if mix.shared is not None:
        out = out + passed(mix.shared) / (1 + np.exp(-(row @ mix.shared_gate.weight.astype(np.float64))))
    return out


@given(
    tokens=st.integers(0, 20),
    num_experts=st.integers(1, 9),
    data=st.data(),
    normalised=st.booleans(),
    shared=st.booleans(),
)
def test_grouped_products_equal_the_formula_row_by_row(tokens, num_experts, data, normalised, shared):
    top_k = data.draw(st.integers(1, num_experts))
    mix = mixture(num_experts, top_k, normalised=normalised, shared=shared, seed=data.draw(st.integers(0, 99)))
    h = np.random.default_rng(tokens).standard_normal((tokens, HIDDEN), dtype=np.float32)
    together = run(mix, h)
    assert together.shape == h.shape
    for row, got in zip(h, together, strict=True):
        np.testing.assert_allclose(got, by_the_book(mix, row.astype(np.float64)), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got, run(mix, row[None])[0], rtol=1e-5, atol=1e-5)


def test_of_equal_experts_the_lowest_indices_are_chosen():
    mix = mixture(8, 3, normalised=True, shared=False)
    mix.router.weight[...] = 0
    chosen, shares = mix.route(np.ones((2, HIDDEN), np.float32))
    assert chosen.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(shares, 1 / 3, rtol=1e-6)
    mix.router.weight[:, [5, 2]] = 1
    assert mix.route(np.ones((1, HIDDEN), np.float32))[0].tolist() == [[2, 5, 0]]


def test_routing_equals_torch_topk():
    torch = pytest.importorskip("torch", reason="the oracle: pip install torch")
    mix = mixture(32, 8, normalised=True, shared=False)
    h = np.random.default_rng(1).standard_normal((50, HIDDEN), dtype=np.float32)
    wanted = torch.softmax(torch.tensor(h @ mix.router.weight), -1).topk(8, -1)
    chosen, shares = mix.route(h)
    np.testing.assert_array_equal(chosen, wanted.indices.numpy())
    np.testing.assert_allclose(shares, (wanted.values / wanted.values.sum(-1, keepdim=True)).numpy(), rtol=1e-5)


def test_a_row_of_nan_stays_alone():
    mix = mixture(6, 2, normalised=True, shared=True)
    h = np.random.default_rng(2).standard_normal((5, HIDDEN), dtype=np.float32)
    clean = run(mix, h)
    h[3] = np.nan
    poisoned = run(mix, h)
    assert np.isnan(poisoned[3]).all()
    others = [0, 1, 2, 4]
    np.testing.assert_allclose(poisoned[others], clean[others], rtol=0, atol=1e-5)
