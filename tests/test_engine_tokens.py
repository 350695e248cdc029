"""What the engine generates: the right tokens, the right text, the right end, however it was scheduled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax

from engine_support import EOS, Answers, ByteTokenizer, RemoteRunner, SpyRunner, ask, drive, greedy, make_engine, wanted
from nanovllm.batch import SeqOutput, TokenLogprob
from nanovllm.builtin.mock import MockRunner, Script, chain_logits, chain_states, expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.errors import RequestError
from nanovllm.intake import Ticket
from nanovllm.request import Finish, Request, SamplingParams
from nanovllm.scheduler import MIN_ROWS

PROMPT = list(range(10, 30))

# Engines that schedule the same requests in very different ways.
ENGINES = {
    "plain": {},
    "one at a time": {"max_num_seqs": 1},
    "chunked": {"max_num_seqs": 3, "max_num_batched_tokens": 7},
    "no prefix cache": {"prefix_caching": False},
}
POOLS = {
    "roomy": {},
    "small blocks": {"block_size": 1},
    "tight pool": {"block_size": 4, "num_blocks": 14},  # holds 56 tokens: two sequences preempt each other
    "lanes": {"layout": "lanes"},
}

# ----------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("how", ENGINES)
def test_the_tokens_are_the_models_however_they_were_scheduled(how: str, pool: str) -> None:
    engine = make_engine(MockRunner(**POOLS[pool]), **ENGINES[how])
    prompts = [PROMPT[:n] for n in (1, 5, 12, 16, 17, 20)] * 2
    tickets = [ask(engine, p, greedy(15, ignore_eos=False)) for p in prompts]
    answers = drive(engine)
    for ticket, prompt in zip(tickets, prompts, strict=True):
        assert answers.ids(ticket) == wanted(prompt, greedy(15, ignore_eos=False))
    if pool == "tight pool" and how != "one at a time":
        assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("how", ENGINES)
def test_seeded_samples_are_the_same_however_they_were_scheduled(how: str, pool: str) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(temperature=0.9, top_p=0.9, seed=seed, max_tokens=12, ignore_eos=True)

    alone = []
    for seed in range(5):
        engine = make_engine()
        ticket = ask(engine, PROMPT, params(seed), n=2)
        answers = drive(engine)
        alone.append([answers.ids(ticket, i) for i in range(2)])
    assert len({tuple(ids) for pair in alone for ids in pair}) == 10  # every seed and completion draws its own
    engine = make_engine(MockRunner(**POOLS[pool]), **ENGINES[how])
    tickets = [ask(engine, PROMPT, params(seed), n=2) for seed in range(5)]
    answers = drive(engine)
    assert [[answers.ids(t, i) for i in range(2)] for t in tickets] == alone


def test_without_a_seed_every_request_draws_its_own() -> None:
    engine = make_engine()
    tickets = [ask(engine, PROMPT, SamplingParams(max_tokens=20, ignore_eos=True)) for _ in range(3)]
    answers = drive(engine)
    assert len({tuple(answers.ids(t)) for t in tickets}) == 3


def test_a_request_that_comes_mid_run_joins_the_next_step() -> None:
    runner = SpyRunner()
    engine = make_engine(runner)
    first = ask(engine, PROMPT)
    engine.step()
    second = ask(engine, PROMPT[:3])
    engine.step()
    assert set(runner.steps[0]) == {first.sequences[0].seq_id}
    assert set(runner.steps[1]) == {first.sequences[0].seq_id, second.sequences[0].seq_id}


def test_a_leaver_frees_its_slot_in_the_same_step() -> None:
    runner = SpyRunner()
    engine = make_engine(runner, max_num_seqs=1)
    first, second = ask(engine, PROMPT, greedy(3)), ask(engine, PROMPT, greedy(3))
    answers = Answers()
    for _ in range(3):
        answers.take(engine.step())
    assert answers.of(first).finish is Finish.LENGTH
    assert runner.released == [first.sequences[0].seq_id]
    answers.take(engine.step())
    assert set(runner.steps[3]) == {second.sequences[0].seq_id}


def test_a_decode_step_computes_one_token() -> None:
    runner = SpyRunner()
    engine = make_engine(runner)
    ask(engine, PROMPT, greedy(30))
    drive(engine)
    first, *rest = [stop - start for step in runner.steps for start, stop in step.values()]
    assert first == len(PROMPT)
    assert rest == [1] * 29


def test_lower_priority_numbers_run_first() -> None:
    engine = make_engine(max_num_seqs=1)
    late = ask(engine, PROMPT, greedy(2), priority=5)
    soon = ask(engine, PROMPT, greedy(2), priority=-5)
    also = ask(engine, PROMPT, greedy(2), priority=-5)
    ends = []
    while engine.has_work:
        ends += [d.request_id for d in engine.step() if d.finish is not None]
    assert ends == [soon.request_id, also.request_id, late.request_id]


# ------------------------------------------------------------------------------------------- ends


def test_the_models_own_end_and_ignore_eos() -> None:
    engine = make_engine(MockRunner(script=Script(tokens=[7, 8, EOS, 9])))
    stops, goes_on = ask(engine, PROMPT, greedy(4, ignore_eos=False)), ask(engine, PROMPT, greedy(4))
    answers = drive(engine)
    assert answers.ids(stops) == [7, 8, EOS]
    assert (answers.of(stops).finish, answers.of(stops).stop_reason) == (Finish.STOP, EOS)
    assert answers.ids(goes_on) == [7, 8, EOS, 9]
    assert answers.of(goes_on).finish is Finish.LENGTH


def test_the_users_eos_replaces_the_files() -> None:
    engine = make_engine(MockRunner(script=Script(tokens=[EOS, 9, 8])), eos_ids=[8, 9])
    ticket = ask(engine, PROMPT, greedy(10, ignore_eos=False))
    assert drive(engine).ids(ticket) == [EOS, 9]


def test_stop_token_ids_end_an_answer_and_their_text_is_not_shown() -> None:
    tokenizer = SimpleBPETokenizer()
    ids = tokenizer.encode("hello world")
    engine = make_engine(MockRunner(script=Script(tokens=ids)))
    ticket = ask(engine, PROMPT, greedy(10, stop_token_ids=[ids[-1]]))
    done = drive(engine).of(ticket)
    assert (done.text, done.finish, done.stop_reason) == ("hello ", Finish.STOP, ids[-1])


def test_min_tokens_puts_off_every_kind_of_end() -> None:
    tokenizer = SimpleBPETokenizer()
    [word] = tokenizer.encode("hello")
    script = Script(tokens=[EOS, word, EOS, word, word, word])
    engine = make_engine(MockRunner(script=script))
    by_id = ask(engine, PROMPT, greedy(6, ignore_eos=False, min_tokens=3))
    by_text = ask(engine, PROMPT, greedy(6, min_tokens=3, stop="hello"))
    answers = drive(engine)
    # EOS is masked for three tokens: the script's first choice cannot be drawn.
    assert EOS not in answers.ids(by_id)[:3]
    # The stop that lies within the first tokens passes; the one that begins after them ends the text.
    assert len(answers.ids(by_text)) == 4
    assert answers.of(by_text).stop_reason == "hello"
    assert answers.of(by_text).text == "hello"


def test_a_stop_id_counts_only_after_min_tokens_also_where_nobody_masks_it() -> None:
    engine = make_engine(RemoteRunner([SeqOutput((EOS,)) for _ in range(5)]))
    ticket = ask(engine, PROMPT, greedy(5, ignore_eos=False, min_tokens=2))
    done = drive(engine).of(ticket)
    assert (done.token_ids, done.finish) == ((EOS,) * 3, Finish.STOP)


def test_the_models_length_is_an_end() -> None:
    engine = make_engine(MockRunner(max_model_len=32))
    ticket = ask(engine, PROMPT, greedy(None))
    done = drive(engine).of(ticket)
    assert list(done.token_ids) == expected(PROMPT, 12)
    assert done.finish is Finish.LENGTH


def test_the_pools_length_is_an_end() -> None:
    engine = make_engine(MockRunner(block_size=4, num_blocks=6))  # 24 tokens, and the last one needs no KV
    ticket = ask(engine, PROMPT, greedy(None))
    done = drive(engine).of(ticket)
    assert list(done.token_ids) == expected(PROMPT, 5)
    assert done.finish is Finish.LENGTH


def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers() -> None:
    engine = make_engine(MockRunner(block_size=4, num_blocks=5, max_model_len=64))
    with pytest.raises(RequestError, match=r"21 tokens.*holds 20"):
        ask(engine, [5] * 21)
    with pytest.raises(RequestError, match=r"64 tokens.*length is 64"):
        ask(engine, [5] * 64)
    ticket = ask(engine, [5] * 20, greedy(None))
    assert drive(engine).ids(ticket) == expected([5] * 20, 1)


# ------------------------------------------------------------------------------------------- text


@given(
    text=st.text("aäß€😀 ", min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 5), min_size=1, max_size=40),
    stop=st.lists(st.text("aäß€😀 ", min_size=1, max_size=3), max_size=2),
)
def test_a_stream_joins_to_the_text_for_every_split(text: str, cuts: list[int], stop: list[str]) -> None:
    """Also where a step brings many tokens, half a character, or nothing; `Answers` compares stream and text."""
    rest, outputs = list(text.encode()), []
    for cut in [*cuts, len(rest)]:
        outputs.append(SeqOutput(tuple(rest[:cut])))
        rest = rest[cut:]
    engine = make_engine(RemoteRunner([*outputs, SeqOutput(finish=Finish.STOP)]), ByteTokenizer())
    ticket = ask(engine, "x", greedy(500, stop=stop))
    done = drive(engine).of(ticket)
    # The first stop to be complete ends the text before it begins; of several there, the longest.
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    want = text if not ends else text[: min(ends)[0] - len(min(ends)[2])]
    assert done.text == want
    assert done.stop_reason == (min(ends)[2] if ends else None)


def test_half_a_character_is_never_shown_before_the_true_end() -> None:
    whole = "€".encode()
    engine = make_engine(RemoteRunner([SeqOutput((b,)) for b in whole + whole[:2]]), ByteTokenizer())
    ticket = ask(engine, "x", greedy(5))
    answers = drive(engine)
    assert [d.text for d in answers.deltas[ticket.request_id, 0]] == ["", "", "€", "", "\ufffd"]


def test_a_stop_over_token_borders_never_leaks() -> None:
    engine = make_engine(RemoteRunner([SeqOutput((b,)) for b in b"ab ENDER END. more"]), ByteTokenizer())
    ticket = ask(engine, "x", greedy(100, stop=["END."]))
    answers = drive(engine)
    shown = [d.text for d in answers.deltas[ticket.request_id, 0]]
    assert "".join(shown) == "ab ENDER "
    assert shown[:5] == ["a", "b", " ", "", ""]


def test_held_back_text_comes_when_the_answer_ends_otherwise() -> None:
    engine = make_engine(RemoteRunner([SeqOutput((b,)) for b in b"abEN"]), ByteTokenizer())
    ticket = ask(engine, "x", greedy(4, stop=["END"]))
    assert drive(engine).of(ticket).text == "abEN"


def test_an_abort_gives_what_was_held_back() -> None:
    engine = make_engine(RemoteRunner([SeqOutput(tuple("abEN€".encode()[:-1]))]), ByteTokenizer())
    ticket = ask(engine, "x", greedy(50, stop="END"))
    answers = Answers()
    answers.take(engine.step())
    assert answers.deltas[ticket.request_id, 0][0].text == "ab"
    engine.abort(ticket.request_id)
    assert drive(engine, answers).of(ticket).text == "abEN\ufffd"


def test_tokens_after_an_end_in_the_same_step_do_not_count() -> None:
    logprobs = tuple(TokenLogprob(i, -1.0, 1, ()) for i in b"abcdef")
    outputs = [SeqOutput(tuple(b"abcdef"), logprobs=logprobs), SeqOutput(tuple(b"ghi"), logprobs=logprobs[:3])]
    engine = make_engine(RemoteRunner(outputs, outputs, outputs), ByteTokenizer())
    by_length = ask(engine, "x", greedy(2, logprobs=0))
    by_id = ask(engine, "x", greedy(100, stop_token_ids=[ord("d")]))
    by_text = ask(engine, "x", greedy(100, stop=["eg", "fg"]))
    answers = drive(engine)
    assert (answers.of(by_length).text, answers.of(by_length).token_ids) == ("ab", tuple(b"ab"))
    assert answers.of(by_length).logprobs == logprobs[:2]
    assert (answers.of(by_id).text, answers.of(by_id).token_ids) == ("abc", tuple(b"abcd"))
    assert (answers.of(by_text).text, answers.of(by_text).token_ids) == ("abcde", tuple(b"abcdefg"))


def test_a_runner_that_tokenizes_brings_text() -> None:
    runner = RemoteRunner(
        [SeqOutput(text="hel"), SeqOutput(), SeqOutput(text="lo wor"), SeqOutput(text="ld", finish=Finish.STOP)],
        [SeqOutput(text="one S"), SeqOutput(text="TOP two")],
        tokenizes=True,
        vocab_size=None,
    )
    from nanovllm.engine import Engine

    engine = Engine(runner)
    plain, stopped = ask(engine, "hello"), ask(engine, "there", greedy(50, stop="STOP"))
    answers = drive(engine)
    assert (answers.of(plain).text, answers.of(plain).finish) == ("hello world", Finish.STOP)
    assert (answers.of(stopped).text, answers.of(stopped).stop_reason) == ("one ", "STOP")


# --------------------------------------------------------------------------------------- logprobs


def reference(context: list[int]) -> np.ndarray:
    """(len(context), vocab) log-probabilities of what follows each position, by scipy."""
    return log_softmax(chain_logits(chain_states(context), 125).astype(np.float64), axis=-1)


def assert_scored(got: TokenLogprob, logprobs: np.ndarray, token: int, num_top: int) -> None:
    assert got.token_id == token
    assert got.logprob == pytest.approx(logprobs[token], abs=1e-9)
    order = np.argsort(-logprobs, kind="stable")
    assert got.rank == order.tolist().index(token) + 1
    assert [i for i, _ in got.top] == order[:num_top].tolist()
    assert [value for _, value in got.top] == pytest.approx(logprobs[order[:num_top]], abs=1e-9)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("how", ENGINES)
def test_logprobs_are_those_of_the_raw_logits(how: str, pool: str) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True, logprobs=4, prompt_logprobs=2)
    engine = make_engine(MockRunner(**POOLS[pool]), **ENGINES[how])
    prompts = [PROMPT, PROMPT[:9], PROMPT[:1], PROMPT]
    tickets = [ask(engine, p, params, n=2) for p in prompts]
    answers = drive(engine)
    for ticket, prompt in zip(tickets, prompts, strict=True):
        output = ticket.output(answers.of(ticket, i) for i in range(2))
        for done in output.completions:
            table = reference([*prompt, *done.token_ids])
            assert done.logprobs is not None
            assert len(done.logprobs) == len(done.token_ids) == 12
            for i, (got, token) in enumerate(zip(done.logprobs, done.token_ids, strict=True)):
                assert_scored(got, table[len(prompt) + i - 1], token, 4)
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for i, token in enumerate(prompt[1:], 1):
            got = output.prompt_logprobs[i]
            assert got is not None
            assert_scored(got, reference(prompt)[i - 1], token, 2)


def test_prompt_logprobs_of_a_long_prompt_come_in_pieces_of_bounded_rows() -> None:
    prompt = [(7 * i) % 120 + 4 for i in range(500)]
    runner = SpyRunner()
    engine = make_engine(runner, max_num_seqs=4)
    scored = ask(engine, prompt, greedy(3, prompt_logprobs=0))
    other = ask(engine, PROMPT, greedy(20))
    answers = drive(engine)
    assert max(stop - start for step in runner.steps for start, stop in step.values()) <= MIN_ROWS
    output = scored.output([answers.of(scored)])
    assert output.prompt_logprobs is not None
    assert [lp.token_id for lp in output.prompt_logprobs[1:] if lp is not None] == prompt[1:]
    table = reference(prompt)
    assert [lp.logprob for lp in output.prompt_logprobs[1:] if lp is not None] == pytest.approx(
        [table[i - 1][token] for i, token in enumerate(prompt) if i], abs=1e-9
    )
    assert answers.ids(scored) == expected(prompt, 3)
    assert answers.ids(other) == expected(PROMPT, 20)


def test_logprobs_are_absent_where_nobody_asked() -> None:
    engine = make_engine()
    plain, asked = ask(engine, PROMPT), ask(engine, PROMPT, greedy(logprobs=0))
    answers = drive(engine)
    assert answers.of(plain).logprobs is None
    assert plain.output([answers.of(plain)]).prompt_logprobs is None
    assert [lp.top for lp in answers.of(asked).logprobs or ()] == [()] * 8


# ------------------------------------------------------------------------------- siblings and salt


def cached(answers: Answers, ticket: Ticket) -> list[int]:
    return [answers.of(ticket, s.index).stats.num_cached_tokens for s in ticket.sequences]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_siblings_share_the_prompt_and_compute_it_once(prefix_caching: bool) -> None:
    runner = SpyRunner(block_size=4)
    engine = make_engine(runner, prefix_caching=prefix_caching)
    ticket = ask(engine, PROMPT[:18], greedy(4), n=5)
    answers = drive(engine)
    assert cached(answers, ticket) == [0, 16, 16, 16, 16]  # four full blocks; the tail is recomputed
    assert all(answers.ids(ticket, i) == expected(PROMPT[:18], 4) for i in range(5))
    again = ask(engine, PROMPT[:18], greedy(4), n=2)
    answers = drive(engine)
    assert cached(answers, again) == [16 if prefix_caching else 0, 16]


def test_salts_share_nothing() -> None:
    engine = make_engine(MockRunner(block_size=4))
    hits = []
    for salt in (None, "a", "b", None, "a", "b"):
        ticket = ask(engine, PROMPT, greedy(2), cache_salt=salt)
        hits.append(cached(drive(engine), ticket)[0])
    assert hits == [0, 0, 0, 16, 16, 16]  # of 20 tokens, the last block is always computed


def test_a_leader_that_is_aborted_does_not_hold_up_its_siblings() -> None:
    engine = make_engine(MockRunner(block_size=4), max_num_batched_tokens=32)
    ticket = engine.add(Request(prompt=[9] * 100, params=greedy(3), n=3))
    answers = Answers()
    answers.take(engine.step())  # the leader is in the middle of its prompt
    engine.abort(ticket.request_id)
    drive(engine, answers)
    assert [answers.of(ticket, i).finish for i in range(3)] == [Finish.ABORT] * 3
    assert answers.has_ended(ticket)


def test_the_stats_of_a_request_add_up() -> None:
    ticks = iter(range(10**6))
    engine = make_engine(MockRunner(block_size=4, num_blocks=14), clock=lambda: float(next(ticks)))
    tickets = [ask(engine, PROMPT, greedy(20)) for _ in range(2)]
    answers = drive(engine)
    for ticket in tickets:
        stats = answers.of(ticket).stats
        assert (stats.num_prompt_tokens, stats.num_output_tokens) == (20, 20)
        assert stats.queue_time is not None
        assert stats.ttft is not None
        assert stats.tpot is not None
        assert 0 < stats.queue_time < stats.ttft < stats.total_time
        assert stats.ttft + 19 * stats.tpot <= stats.total_time
    preempted = sum(answers.of(t).stats.num_preemptions for t in tickets)
    totals = engine.stats()
    assert preempted == totals.num_preemptions > 0
    # Each of the 40 prompt tokens was computed or cached; recomputing after a preemption adds to both.
    assert totals.num_prefill_tokens + totals.num_cached_tokens >= 40
    assert totals.num_requests == 2
