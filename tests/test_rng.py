"""The uniforms of sampling: Philox4x32-10 by its published answers, and numbers that depend on their own place only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nanovllm import rng

# Random123's kat_vectors file, philox4x32 10: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
MASK = 2**32 - 1
seeds = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1]))
indices = st.integers(0, 2**32 - 1)
positions = st.one_of(st.integers(0, 5000), st.integers(0, 2**64 - 1))
triples = st.lists(st.tuples(seeds, indices, positions), min_size=1, max_size=9)


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Section 3 of the paper, one Python int at a time."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k, q & MASK, (p >> 32) ^ d ^ m, p & MASK
        k, m = (k + 0x9E3779B9) & MASK, (m + 0xBB67AE85) & MASK
    return [a, b, c, d]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    columns = [np.array(words(text), np.uint64)[:, None].repeat(3, axis=1) for text in (counter, key)]
    got = rng.philox(*columns)
    assert [got[:, i].tolist() for i in range(3)] == [words(answer)] * 3
    assert philox(words(counter), words(key)) == words(answer)


@given(triples)
def test_each_number_is_the_documented_function_of_its_own_triple(rows: list[tuple[int, int, int]]) -> None:
    got = rng.uniforms(*zip(*rows, strict=True))
    assert got.dtype == np.float64
    for (seed, index, position), number in zip(rows, got.tolist(), strict=True):
        w = philox([position & MASK, position >> 32, index, 0], [seed & MASK, seed >> 32])
        assert number == ((w[0] << 32 | w[1]) >> 11) / 2**53
        assert 0 <= number < 1


@given(triples)
def test_a_batch_changes_nothing(rows: list[tuple[int, int, int]]) -> None:
    together = rng.uniforms(*zip(*rows, strict=True)).tolist()
    assert together == [rng.uniforms([s], [i], [p])[0] for s, i, p in rows]


def test_no_rows() -> None:
    assert rng.uniforms([], [], []).shape == (0,)


def test_inputs_are_left_alone() -> None:
    counter, key = np.ones((4, 5), np.uint64), np.ones((2, 5), np.uint64)
    rng.philox(counter, key)
    assert (counter == 1).all()
    assert (key == 1).all()


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32, 2**64 - 1])
@pytest.mark.parametrize("along", ["position", "index", "seed"])
def test_uniform_and_uncorrelated_along_every_axis(seed: int, along: str) -> None:
    num = 20_000
    zeros, steps = [0] * num, list(range(num))
    u = {
        "position": lambda: rng.uniforms([seed] * num, zeros, steps),
        "index": lambda: rng.uniforms([seed] * num, steps, zeros),
        "seed": lambda: rng.uniforms([(seed + i) % 2**64 for i in steps], zeros, [7] * num),
    }[along]()
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    for lag in (1, 2, 16):
        # The correlation of independent numbers has standard deviation 1 / sqrt(num).
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 4.5 / np.sqrt(num)
    pairs = np.histogram2d(u[0::2], u[1::2], bins=10, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4


def test_neighbouring_seeds_indices_and_positions_share_no_number() -> None:
    grid = [(s, i, p) for s in range(20) for i in range(20) for p in range(20)]
    assert len(set(rng.uniforms(*zip(*grid, strict=True)).tolist())) == len(grid)
