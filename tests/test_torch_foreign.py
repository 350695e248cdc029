"""Models that others exported with torch: however requests are scheduled, the tokens are the model's own, run alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

import foreign_torch
from engine_support import Answers, ask, drive, greedy, make_engine
from foreign_torch import BAD_TOKEN, KV_HEADS, LAYERS, MAX_LEN, SIZE, STYLES, VOCAB, Decoder, make_runner, write
from lanes_support import run_random_program, step
from nanovllm.batch import ALL_PARAMETERS, Lanes
from nanovllm.errors import RunnerError
from nanovllm.request import SamplingParams

torch = foreign_torch.torch

WITH_PAST = [name for name in STYLES if name.startswith(("flat", "pairs", "optional", "tuple", "dict"))]
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * SIZE * 4
ROUNDING = {"rtol": 0, "atol": 1e-3}  # of logits that go up to 30
LENGTHS = (1, 3, 8, 17, 30)
# Engines that schedule the same requests in very different ways.
ENGINES = {
    "alone": {"max_num_seqs": 1},
    "batched": {},
    "chunked": {"max_num_seqs": 4, "max_num_batched_tokens": 8},
}


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(4, BAD_TOKEN, length).tolist()


def spy(runner, monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the token ids of every run from now on."""
    shapes = []
    decoder = runner._keeper._decoder
    answer = decoder.answer
    monkeypatch.setattr(
        decoder, "answer", lambda tokens, *more: shapes.append(tokens.ids.shape) or answer(tokens, *more)
    )
    return shapes


def answers(runner, prompts: Sequence[Sequence[int]], num: int = 12, **options) -> list[list[int]]:
    engine = make_engine(runner, **options)
    tickets = [ask(engine, p, greedy(num)) for p in prompts]
    found = drive(engine)
    return [found.ids(t) for t in tickets]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder().eval()


@pytest.fixture(scope="module")
def archives(tmp_path_factory, decoder):
    root = tmp_path_factory.mktemp("archives")
    return {name: write(root / name, *how, decoder) for name, how in STYLES.items()}


@pytest.fixture(scope="module", params=STYLES)
def runner(request, archives):
    return make_runner(archives[request.param])


@pytest.fixture(scope="module")
def wanted(decoder) -> list[list[int]]:
    return [decoder.greedy(prompt(n, n), 12) for n in LENGTHS]


@pytest.mark.parametrize("how", ENGINES)
def test_greedy_tokens_are_the_models_own(how, runner, wanted):
    assert answers(runner, [prompt(n, n) for n in LENGTHS], **ENGINES[how]) == wanted


@pytest.mark.parametrize("seed", range(3))
def test_random_programs_equal_each_sequence_alone(seed, runner, decoder):
    rng = random.Random(seed)
    texts = [prompt(rng.randint(1, 50), i) for i in range(rng.randint(2, 9))]
    run_random_program(runner, texts, [decoder.alone(text).numpy() for text in texts], rng, ROUNDING)


@pytest.mark.parametrize("name", ["ids-only-export", "flat-export", "optional-script"])
def test_tokens_beside_requests_that_are_aborted(name, archives, wanted):
    engine = make_engine(make_runner(archives[name]), max_num_seqs=4, max_num_batched_tokens=20)
    tickets, found = [], Answers()
    for n in LENGTHS:
        tickets.append(ask(engine, prompt(n, n), greedy(12)))
        doomed = ask(engine, prompt(2 * n, n + 1), greedy(40))
        for _ in range(2):
            found.take(engine.step())
        engine.abort(doomed.request_id)
    drive(engine, found)
    assert [found.ids(t) for t in tickets] == wanted


@pytest.mark.parametrize("name", ["flat-script", "pairs-export"])
def test_seeded_samples_do_not_depend_on_the_schedule(name, archives):
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=12, ignore_eos=True) for i in range(len(LENGTHS))]

    def sampled(**options) -> list[list[int]]:
        engine = make_engine(make_runner(archives[name]), **options)
        tickets = [ask(engine, prompt(n, n), p) for n, p in zip(LENGTHS, params, strict=True)]
        found = drive(engine)
        return [found.ids(t) for t in tickets]

    alone = sampled(max_num_seqs=1)
    assert sampled() == sampled(max_num_seqs=3, max_num_batched_tokens=8) == alone
    assert alone != answers(make_runner(archives[name]), [prompt(n, n) for n in LENGTHS])


@pytest.mark.parametrize("name", WITH_PAST)
def test_decode_computes_one_token_of_each_sequence(name, archives, monkeypatch):
    runner = make_runner(archives[name])
    texts = [prompt(n, n) for n in (5, 30, 17)]
    step(runner, *((lane, t, 0, len(t) - 3, 0) for lane, t in enumerate(texts)))
    shapes = spy(runner, monkeypatch)
    for i in (3, 2, 1):
        step(runner, *((lane, t, len(t) - i, len(t) - i + 1, 1) for lane, t in enumerate(texts)))
    assert shapes == [(3, 1)] * 3


def test_while_the_same_sequences_go_on_nothing_is_moved(archives, monkeypatch):
    runner = make_runner(archives["flat-export"])
    texts = [prompt(n, n) for n in (5, 30, 17)]
    step(runner, *((lane, t, 0, len(t) - 4, 0) for lane, t in enumerate(texts)))
    packed = []
    decoder = runner._keeper._decoder
    pack = decoder.pack
    monkeypatch.setattr(decoder, "pack", lambda *shape: packed.append(shape[:2]) or pack(*shape))
    for i in (4, 3, 2):
        step(runner, *((lane, t, len(t) - i, len(t) - i + 1, 1) for lane, t in enumerate(texts)))
    assert packed == [(3, 26)]  # once, after the prompts
    step(runner, *((lane, t, len(t) - 1, len(t), 1) for lane, t in list(enumerate(texts))[:2]))
    assert packed == [(3, 26), (2, 29)]


# ------------------------------------------------------------------------------------------- faults


def test_a_request_with_nan_logits_fails_alone_and_the_engine_goes_on(tmp_path, wanted):
    """One token's embedding is NaN; its sequence shares runs with others."""
    runner = make_runner(write(tmp_path / "nan", *STYLES["flat-script"], Decoder("NaN of a token").eval()))
    engine = make_engine(runner, max_num_seqs=4, max_num_batched_tokens=40)
    bad = ask(engine, [5, BAD_TOKEN, 7], greedy(12))
    tickets = [ask(engine, prompt(n, n), greedy(12)) for n in LENGTHS]
    found = drive(engine)
    assert "NaN logits" in found.of(bad).error
    assert [found.ids(t) for t in tickets] == wanted


def test_a_model_that_raises_ends_the_requests_of_that_step_and_no_other(tmp_path, wanted):
    runner = make_runner(write(tmp_path / "raises", *STYLES["flat-script"], Decoder("raises at a token").eval()))
    engine = make_engine(runner)
    bad, beside = ask(engine, [5, BAD_TOKEN], greedy(12)), ask(engine, prompt(8, 8), greedy(12))
    found = drive(engine)
    for ticket in (bad, beside):
        assert "torch failed in a run of 2 x 8 tokens" in found.of(ticket).error
        assert "on purpose" in found.of(ticket).error
    assert engine.health().is_live
    tickets = [ask(engine, prompt(n, n), greedy(12)) for n in LENGTHS]
    later = drive(engine)
    assert [later.ids(t) for t in tickets] == wanted


@pytest.mark.parametrize(
    ("fault", "style", "batches"),
    [
        ("rows coupled", "flat-script", []),
        ("rows coupled", "ids-only-export", []),
        ("mask ignored", "flat-script", ["prompts"]),
        ("mask ignored", "optional-script", ["prompts"]),
    ],
)
def test_what_a_model_does_wrong_is_found_and_not_used(fault, style, batches, tmp_path, monkeypatch):
    """Tokens in company are those that the very same model gives each sequence alone, computed from its beginning."""
    decoder = Decoder(fault).eval()
    runner = make_runner(write(tmp_path / "model", *STYLES[style], decoder))
    assert runner.info.description["batches"] == batches
    shapes = spy(runner, monkeypatch)
    texts = [prompt(n, n) for n in (3, 20, 9)]
    assert answers(runner, texts, 8) == [decoder.greedy(t, 8) for t in texts]
    assert {rows for rows, columns in shapes if columns == 1 or not batches} == {1}


def test_a_run_that_fails_leaves_the_other_lanes_as_they_were(archives, decoder, monkeypatch):
    runner = make_runner(archives["dict-script"])
    a, b, c = prompt(8, 1), prompt(9, 2), prompt(10, 3)
    step(runner, (0, a, 0, 7, 0), (1, b, 0, 8, 0), (2, c, 0, 9, 0))
    with monkeypatch.context() as patch:
        patch.setattr(runner._keeper._decoder, "_module", lambda **inputs: 1 / 0)
        with pytest.raises(RunnerError, match="torch failed in a run of 2 x 1 tokens: division by zero"):
            step(runner, (0, a, 7, 8, 1), (1, b, 8, 9, 1))
    for lane in (0, 1):
        runner.release(lane, lane)
    got = step(runner, (0, b, 0, 9, 1), (1, a, 0, 8, 1), (2, c, 9, 10, 1))
    np.testing.assert_allclose(got, [decoder.alone(t)[-1].numpy() for t in (b, a, c)], **ROUNDING)


# ------------------------------------------------------------------------------------------- the border


def test_info(archives):
    info = make_runner(archives["flat-export"], max_num_seqs=3).info
    assert (info.vocab_size, info.max_model_len, info.max_num_seqs, info.eos_ids) == (VOCAB, MAX_LEN, 3, (3,))
    assert info.kv == Lanes(3, MAX_LEN)
    assert (info.can_chunk, info.can_resume_prefix, info.supports) == (True, False, ALL_PARAMETERS)
    facts = info.description
    assert (facts["model"], facts["graph"], facts["format"]) == ("flat-export", "model.pt2", "pt2")
    assert (facts["style"], facts["past"], facts["dtype"]) == ("past and present", "grown", "float32")
    assert facts["batches"] == ["decodes", "prompts", "chunks", "mixed"]
    assert facts["kv_bytes"] == 3 * MAX_LEN * TOKEN_BYTES * 3  # at most three copies
    assert facts["weight_bytes"] == sum(t.nbytes for t in Decoder().state_dict().values())
    assert (facts["device"], facts["threads"]) == ("cpu", 1)


def test_prompt_logprobs_are_not_offered_where_only_the_last_token_has_logits(archives):
    assert make_runner(archives["last-logits-script"]).info.supports == ALL_PARAMETERS - {"prompt_logprobs"}


def test_a_torchscript_model_is_computed_in_the_type_that_was_asked_for(archives, decoder):
    runner = make_runner(archives["pairs-script"], dtype="bf16")
    assert runner.info.description["dtype"] == "bfloat16"
    assert runner.info.description["kv_bytes"] == 8 * MAX_LEN * (TOKEN_BYTES // 2) * 3
    text = prompt(20)
    step(runner, (0, text, 0, 19, 0))
    got, exact = step(runner, (0, text, 19, 20, 1))[0], decoder.alone(text)[-1].numpy()
    error = np.abs(got - exact).max() / np.ptp(exact)
    assert 1e-4 < error < 5e-2  # that of bfloat16


def test_threads_are_the_runners(archives):
    runner = make_runner(archives["ids-only-script"])
    torch.set_num_threads(2)
    step(runner, (0, prompt(3), 0, 3, 1))
    assert torch.get_num_threads() == 1
