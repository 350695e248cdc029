"""TorchSampler against the written reference and against NumpySampler: the same tokens for the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.request import SamplingParams
from nanovllm.sampler import NumpySampler
from test_sampler import INF, expected, logit, make_row, problems
from torch_support import sampler, torch

WIDE = 20_000  # more than NUCLEUS


def run(logits: Any, rows: list) -> Any:
    return sampler.TorchSampler().sample(torch.tensor(np.array(logits, np.float32)), rows)


@settings(max_examples=250, deadline=None)
@given(problems(), st.integers(1, 8))
def test_every_combination_agrees_with_the_reference(problem, nucleus):
    (logits,), (row,) = problem
    want = expected(logits, row, exact=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "NUCLEUS", nucleus)
        sampled = run([logits], [row])
    if want:
        assert not sampled.errors
        assert sampled.ids[0] in want
    else:
        assert sampled.errors == NumpySampler().sample(np.array([logits], np.float32), [row]).errors


@settings(max_examples=100, deadline=None)
@given(problems(max_rows=9), st.booleans())
def test_a_row_is_the_same_alone_and_in_any_batch(problem, tiny):
    logits, rows = problem
    width = min(map(len, logits))  # of the tokens that all rows have
    usable = [(x, row) for x, row in zip(logits, rows, strict=True) if len(x) == width]
    with pytest.MonkeyPatch.context() as patch:
        if tiny:
            patch.setattr(sampler, "CHUNK", 2 * width)
        together = run([x for x, _ in usable], [row for _, row in usable])
    for r, (x, row) in enumerate(usable):
        alone = run([x], [row])
        assert alone.errors.get(0) == together.errors.get(r)
        if 0 not in alone.errors:
            assert alone.ids[0] == together.ids[r]
            one, other = (s.logprobs and s.logprobs[i] for s, i in ((alone, 0), (together, r)))
            assert (one or None) == (other or None)


@pytest.mark.parametrize("scale", [0.3, 3.0, 8.0])
@pytest.mark.parametrize("digits", [0, 5])
def test_a_wide_vocabulary_draws_numpys_tokens(scale, digits):
    """Rounded logits tie by the hundred, also where top-k and top-p cut."""
    rng = np.random.default_rng(0)
    filters = [
        {}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 300, "top_p": 0.5}, {"min_p": 0.05},
        {"top_p": 0.999},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {7: 9.0}},
        {"temperature": 0.0, "logprobs": 3, "presence_penalty": 1.0}, {"temperature": 0.0}, {"logprobs": 20},
    ]  # fmt: skip
    context = rng.integers(0, WIDE, 50).tolist()
    rows = [
        make_row(SamplingParams(**{"temperature": 0.7, **f}), u, context, 10)
        for f in filters
        for u in (0.0, 0.5, 0.999)
    ]
    rows.append(make_row(SamplingParams(prompt_logprobs=4), target=11, context=context))
    logits = (rng.normal(size=(len(rows), WIDE)) * scale).round(digits).astype(np.float32)
    got, want = run(logits, rows), NumpySampler().sample(logits, rows)
    assert list(got.ids) == [int(i) for i in want.ids]
    assert got.errors == want.errors == {}
    for one, other in zip(got.logprobs, want.logprobs, strict=True):
        if other is None:
            assert one is None
            continue
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-12)
        assert [i for i, _ in one.top] == [i for i, _ in other.top]
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(logit, min_size=1, max_size=40).filter(lambda x: max(x) > -INF), st.integers(0, 20), st.data())
def test_logprobs_are_numpys(logits, num_top, data):
    token = data.draw(st.integers(0, len(logits) - 1))
    params = SamplingParams(logprobs=num_top, prompt_logprobs=num_top, temperature=0.5, top_k=3)
    rows = [make_row(params, 0.7), make_row(params, target=token), make_row(SamplingParams())]
    x = np.array([logits] * 3, np.float32)
    got, want = run(x, rows), NumpySampler().sample(x, rows)
    assert got.logprobs[2] is None
    for one, other in zip(got.logprobs[:2], want.logprobs[:2], strict=True):
        assert (one.token_id, one.rank, [i for i, _ in one.top]) == (
            other.token_id, other.rank, [i for i, _ in other.top],
        )  # fmt: skip
        assert one.logprob == pytest.approx(other.logprob, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}, {"logprobs": 1}])
@pytest.mark.parametrize("bad", [[np.nan, 1.0, 2.0], [1.0, INF, 2.0], [-INF] * 3])
def test_a_bad_row_is_named_and_changes_no_neighbour(bad, params):
    rows = [make_row(SamplingParams(**({"temperature": 1.0} | params)), 0.6) for _ in range(3)]
    logits = np.array([[1.0, 2.0, 3.0], bad, [3.0, 2.0, 1.0]], np.float32)
    got, want = run(logits, rows), NumpySampler().sample(logits, rows)
    assert got.errors == want.errors
    assert got.errors.keys() == {1}
    assert [got.ids[0], got.ids[2]] == [want.ids[0], want.ids[2]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits_are_never_written_to(dtype):
    logits = torch.arange(12, dtype=getattr(torch, dtype)).view(3, 4)
    before = logits.clone()
    rows = [make_row(SamplingParams(logit_bias={0: 5.0}, top_k=2, logprobs=2)) for _ in range(3)]
    sampler.TorchSampler().sample(logits, rows)
    assert torch.equal(logits, before)


FILTERS = [
    {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"logprobs": 2}, {"temperature": 0.0}, {"presence_penalty": 1.0},
    {"repetition_penalty": 1.2}, {"logit_bias": {3: 1.0}}, {"min_tokens": 9}, {"top_k": 3, "top_p": 0.5},
]  # fmt: skip


def test_one_transfer_brings_everything_back(monkeypatch):
    """What a GPU would be waited for: one copy to the host, whatever the rows ask for."""
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or cpu(self))
    rows = [make_row(SamplingParams(**f), 0.4) for f in FILTERS] + [make_row(SamplingParams(), target=3)]
    run(np.random.default_rng(0).normal(size=(len(rows), 50)), rows)
    run(np.zeros((2, 50)), [make_row(SamplingParams(temperature=0))] * 2)
    assert len(copies) == 2


def test_a_token_without_weight_is_never_drawn():
    """A CPU adds up from the first to the last, so that none can be; a GPU does not."""
    weights = torch.tensor([[0.0, 0.5, 0.0, 1.0], [1.0, 0.0, 0.0, 0.2]], dtype=torch.float64)
    for places, wanted in (([0, 0], [3, 0]), ([1, 3], [1, 3]), ([2, 1], [3, 0])):
        assert sampler._with_weight(torch.tensor(places), weights).tolist() == wanted


def test_nothing_else_waits_for_the_device(monkeypatch):
    """On the device `meta`, which has shapes and no numbers: looking at one before the transfer would fail. What the
    host sends goes there without waiting, also while the device computes the logits."""
    sent = []
    to = torch.Tensor.to

    def send(self, *args, **kwargs):
        found = to(self, *args, **kwargs)
        if self.is_cpu and found.is_meta:
            sent.append(kwargs.get("non_blocking", False))
        return found

    monkeypatch.setattr(torch.Tensor, "to", send)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros(self.shape, dtype=self.dtype))
    monkeypatch.setattr(torch, "tensor", None)  # which would send its numbers and wait until they are there
    for f in FILTERS:
        rows = [make_row(SamplingParams(**f), 0.4, context=(1, 2, 3)), make_row(SamplingParams(**f), target=3)]
        assert not sampler.TorchSampler().sample(torch.empty(2, 50, device="meta"), rows).errors
    assert sent
    assert all(sent)
