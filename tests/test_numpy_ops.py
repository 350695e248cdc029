"""The elementwise steps against scipy and float64."""

from __future__ import annotations

import numpy as np
import pytest

from nanovllm_runner_numpy import ops

X = np.concatenate([np.linspace(-12, 12, 200_001), [0.0, -0.0, 100, -100, 1e4, -1e4, 1e30, -1e30]]).astype(np.float32)
EXACT = X.astype(np.float64)


def apply(name: str, x: np.ndarray) -> np.ndarray:
    y = x.reshape(-1, 1).copy()
    with np.errstate(all="ignore"):
        ops.ACTIVATIONS[name](y)
    return y.reshape(-1).astype(np.float64)


def test_exact_gelu_uses_a_normal_distribution_within_1e_7():
    ndtr = pytest.importorskip("scipy.special", reason="the oracle: pip install scipy").ndtr
    error = np.abs(apply("gelu", X) - EXACT * ndtr(EXACT))
    assert (error / np.maximum(np.abs(EXACT), 1)).max() < 1e-7


@pytest.mark.parametrize("name", ["gelu_tanh", "silu", "relu"])
def test_other_activations(name):
    with np.errstate(over="ignore"):
        wanted = {
            "gelu_tanh": EXACT / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (EXACT + 0.044715 * EXACT**3))),
            "silu": EXACT / (1 + np.exp(-EXACT)),
            "relu": np.maximum(EXACT, 0),
        }[name]
    np.testing.assert_allclose(apply(name, X), wanted, rtol=3e-7, atol=2e-7)


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_activations_work_on_strided_views_and_in_blocks(name, monkeypatch):
    wide = np.random.default_rng(0).standard_normal((50, 40), dtype=np.float32)
    whole, view = wide[:, 3:20].copy(), wide.copy()
    ops.ACTIVATIONS[name](whole)
    monkeypatch.setattr(ops, "BLOCK", 64)
    ops.ACTIVATIONS[name](view[:, 3:20])
    np.testing.assert_array_equal(view[:, 3:20], whole)
    np.testing.assert_array_equal(np.delete(view, range(3, 20), 1), np.delete(wide, range(3, 20), 1))


def test_norms_equal_float64():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((7, 5, 64)) * 30 + 10).astype(np.float32)
    weight, bias = rng.standard_normal((2, 64)).astype(np.float32)
    exact = x.astype(np.float64)
    rms = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(ops.rms_norm(x, weight, None, 1e-5), rms, rtol=2e-6, atol=2e-6)
    centred = exact - exact.mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(ops.layer_norm(x, weight, bias, 1e-5), layer, rtol=1e-5, atol=1e-5)


def test_softmax_of_huge_and_masked_scores():
    scores = np.array([[1e30, -1e30, 1e30], [-np.inf, 5, -np.inf], [90, 89, 88]], np.float32)
    with np.errstate(over="raise", invalid="raise"):
        sums = ops.softmax_(scores)
    np.testing.assert_allclose((scores / sums)[:2], [[0.5, 0, 0.5], [0, 1, 0]])
    np.testing.assert_allclose((scores / sums)[2], np.exp([0, -1, -2]) / np.exp([0.0, -1, -2]).sum(), rtol=1e-6)


@pytest.mark.parametrize("rotated", [8, 4])
def test_rotation_turns_pairs_and_leaves_the_rest(rotated):
    """As complex numbers: (x_j + i x_{j+h}) * exp(i angle)."""
    rng = np.random.default_rng(0)
    x, half = rng.standard_normal((5, 3, 8)).astype(np.float32), rotated // 2
    angles = rng.uniform(-9, 9, (5, 1, half)).astype(np.float32)
    turned = (x[..., :half] + 1j * x[..., half:rotated]) * np.exp(1j * angles)
    y = x.copy()
    ops.rotate_(y, np.cos(angles), np.sin(angles))
    np.testing.assert_allclose(y[..., :half], turned.real, rtol=0, atol=1e-6)
    np.testing.assert_allclose(y[..., half:rotated], turned.imag, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(y[..., rotated:], x[..., rotated:])
