"""LLM, the synchronous face: what it takes, what it refuses, what it returns, and that it lets go of everything."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import numpy as np
import pytest

from engine_support import EOS, RemoteRunner, SpyRunner, assert_idle, greedy, wanted
from nanovllm import LLM, EngineClosed, EngineDead, Finish, Output, Request, RequestError, RequestFailed, SamplingParams
from nanovllm.batch import Batch, SeqOutput
from nanovllm.builtin.mock import MockRunner, Script, expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.errors import RunnerDead

TOKENIZER = SimpleBPETokenizer()
PROMPTS = ["hello world", "how are you", "the", "what is this and that"]
POISON = 99


def make_llm(runner: MockRunner | None = None, **options: Any) -> LLM:
    return LLM.from_components(runner or MockRunner(), SimpleBPETokenizer(), **options)


def answer(prompt: str, params: SamplingParams | None = None) -> list[int]:
    return wanted(TOKENIZER.encode(prompt), params or greedy())


# -------------------------------------------------------------------------------- what it takes


def test_outputs_come_in_prompt_order() -> None:
    """Also where the later prompts end first (the ancestor returned them in the order of their ends)."""
    with make_llm() as llm:
        params = [greedy(20), greedy(3), greedy(11), greedy(1)]
        outputs = llm.generate(PROMPTS, params)
        assert [o["token_ids"] for o in outputs] == [answer(p, x) for p, x in zip(PROMPTS, params, strict=True)]
        assert [o["text"] for o in outputs] == [TOKENIZER.decode(o["token_ids"]) for o in outputs]
        assert [list(o.prompt_token_ids) for o in outputs] == [TOKENIZER.encode(p) for p in PROMPTS]


@pytest.mark.parametrize(
    "prompts",
    [
        "hello world",
        ["hello world"],
        TOKENIZER.encode("hello world"),
        tuple(TOKENIZER.encode("hello world")),
        [TOKENIZER.encode("hello world")],
        np.array(TOKENIZER.encode("hello world")),
        [np.array(TOKENIZER.encode("hello world"), np.uint8)],
        list(np.array(TOKENIZER.encode("hello world"))),
    ],
    ids=lambda p: f"{type(p).__name__} of {type(p[0]).__name__}",
)
def test_a_prompt_comes_in_many_shapes(prompts: Any) -> None:
    with make_llm() as llm:
        [output] = llm.generate(prompts, greedy(5))
        assert output.token_ids == answer("hello world", greedy(5))


def test_shapes_may_be_mixed() -> None:
    with make_llm() as llm:
        outputs = llm.generate(["hello", TOKENIZER.encode("hello"), [{"role": "user", "content": "hello"}]], greedy())
        assert outputs[0].token_ids == outputs[1].token_ids == answer("hello")
        assert list(outputs[2].prompt_token_ids) == TOKENIZER.encode("User: hello\nAssistant:")


def test_a_request_brings_its_own_params() -> None:
    with make_llm() as llm:
        requests = [Request(prompt="hello", params=greedy(3)), Request(prompt="world", params=greedy(5), n=2)]
        outputs = llm.generate(requests)
        assert [o.token_ids for o in outputs] == [answer("hello", greedy(3)), answer("world", greedy(5))]
        assert len(outputs[1].completions) == 2
        assert llm.generate(requests[0])[0].token_ids == answer("hello", greedy(3))
        with pytest.raises(RequestError, match="brings its own"):
            llm.generate(requests, greedy())
        with pytest.raises(RequestError, match="brings its own"):
            llm.generate(requests, n=2)


def test_chat_takes_one_conversation_or_many() -> None:
    with make_llm() as llm:
        one = [{"role": "user", "content": "hello"}]
        two = [{"role": "system", "content": "be"}, {"role": "user", "content": "how"}]
        [single] = llm.chat(one, greedy())
        many = llm.chat([one, two], greedy())
        assert list(single.prompt_token_ids) == TOKENIZER.encode("User: hello\nAssistant:")
        assert [o.token_ids for o in many] == [
            expected(TOKENIZER.encode(t), 8) for t in ("User: hello\nAssistant:", "System: be\nUser: how\nAssistant:")
        ]
        for nothing in ([], None, "hello", [[]]):
            with pytest.raises(RequestError):
                llm.chat(nothing)  # type: ignore[arg-type]


def test_options_reach_every_request() -> None:
    with make_llm() as llm:
        outputs = llm.generate(PROMPTS[:2], SamplingParams(seed=1, max_tokens=6, ignore_eos=True), n=3, cache_salt="x")
        assert [[c.index for c in o.completions] for o in outputs] == [[0, 1, 2]] * 2
        assert len({c.token_ids for o in outputs for c in o.completions}) == 6
        assert llm.generate(PROMPTS[0], greedy(), parse_special=True)[0].token_ids == answer(PROMPTS[0])


def test_nano_vllms_own_example_runs() -> None:
    """Its example.py, call for call; only the model path differs."""
    llm = LLM("demo", runner="mock", enforce_eager=True, tensor_parallel_size=1)
    sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
    prompts = ["introduce yourself", "list all prime numbers within 100"]
    outputs = llm.generate(prompts, sampling_params)
    for _prompt, output in zip(prompts, outputs, strict=True):
        assert isinstance(output["text"], str)
        assert len(output["token_ids"]) == 256 or output["token_ids"][-1] == EOS
    with pytest.raises(KeyError):
        outputs[0]["tokens"]
    llm.close()


# ------------------------------------------------------------------------------- what it refuses


def test_all_prompts_are_refused_if_one_is_impossible() -> None:
    runner = SpyRunner()
    with make_llm(runner) as llm:
        for call in (llm.generate, llm.stream):
            with pytest.raises(RequestError, match="prompt 2 of 3: the prompt is empty"):
                call(["hello", "world", ""], greedy())
        with pytest.raises(RequestError, match=r"^the prompt is empty"):
            llm.generate("", greedy())
        assert not runner.steps
        assert llm.stats().num_requests == 0
        assert_idle(llm.engine)


@pytest.mark.parametrize("params", [5, {"temperature": 0}, "greedy", [greedy()], [greedy()] * 3, [1, 2], iter(())])
def test_params_that_are_none_are_refused(params: Any) -> None:
    with make_llm() as llm, pytest.raises(RequestError, match="params"):
        llm.generate(["hello", "world"], params)


def test_a_failed_request_does_not_lose_the_others_outputs() -> None:
    with make_llm(MockRunner(script=Script(nan_token=POISON))) as llm:
        with pytest.raises(RequestFailed, match="NaN") as caught:
            llm.generate(["hello", [POISON], "world", [POISON, 5]], greedy())
        assert "and 1 more of 4" in str(caught.value)
        outputs: list[Output] = caught.value.outputs
        assert [o.error is None for o in outputs] == [True, False, True, False]
        assert [outputs[0].token_ids, outputs[2].token_ids] == [answer("hello"), answer("world")]
        # A stream gives what the others have to say first.
        seen: dict[int, list[int]] = {}
        with pytest.raises(RequestFailed):  # noqa: PT012
            for delta in llm.stream(["hello", [POISON], "world"], greedy()):
                seen.setdefault(delta.prompt_index, []).extend(delta.token_ids)
        assert seen == {0: answer("hello"), 2: answer("world")}


def test_a_dead_engine_says_so() -> None:
    with make_llm(MockRunner(script=Script(dead_step=1))) as llm:
        with pytest.raises(RequestFailed, match=r"the runner died|the runner failed"):
            llm.generate("hello", greedy())
        with pytest.raises(EngineDead):
            llm.generate("hello", greedy())
        assert not llm.health().is_live


# ---------------------------------------------------------------------------------------- streams


def test_a_stream_of_many_prompts_joins_to_the_same_answers() -> None:
    with make_llm() as llm:
        texts, ids, last = [""] * 4, [[] for _ in range(4)], {}
        for delta in llm.stream(PROMPTS, greedy(9)):
            texts[delta.prompt_index] += delta.text
            ids[delta.prompt_index] += delta.token_ids
            if delta.output is not None:
                last[delta.prompt_index] = delta.output
        outputs = llm.generate(PROMPTS, greedy(9))
        assert texts == [o.text for o in outputs] == [last[i].text for i in range(4)]
        assert ids == [o.token_ids for o in outputs]


def test_streams_and_generates_may_be_nested() -> None:
    with make_llm() as llm:
        outer, inner = [], []
        for delta in llm.stream("hello", greedy(6)):
            outer += delta.token_ids
            assert llm.generate("world", greedy(4))[0].token_ids == answer("world", greedy(4))
            inner.append([t for d in llm.stream("how", greedy(3)) for t in d.token_ids])
        assert outer == answer("hello", greedy(6))
        assert inner == [answer("how", greedy(3))] * len(inner)


def test_interleaved_streams_lose_nothing() -> None:
    with make_llm() as llm:
        streams = [llm.stream(p, greedy(6)) for p in PROMPTS]
        got: list[list[int]] = [[] for _ in streams]
        for i in (3, 0, 0, 1, 3, 2, 2, 2, 0):
            got[i] += next(streams[i]).token_ids
        for i, stream in enumerate(streams):
            got[i] += [t for d in stream for t in d.token_ids]
        assert got == [answer(p, greedy(6)) for p in PROMPTS]


def test_leaving_a_stream_aborts_its_requests() -> None:
    runner = SpyRunner()
    with make_llm(runner) as llm:
        for _delta in llm.stream(PROMPTS, greedy(100)):
            break
        gc.collect()
        assert_idle(llm.engine)
        stream = llm.stream(PROMPTS, greedy(100))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert_idle(llm.engine)
        assert len(runner.released) == 8
        assert not llm.engine.has_work
        assert not llm._mail


def test_a_stream_that_is_never_read_holds_nothing() -> None:
    runner = SpyRunner()
    with make_llm(runner) as llm:
        stream = llm.stream(PROMPTS, greedy(100))
        assert not llm.engine.has_work
        del stream
        gc.collect()
        assert not runner.steps
        assert llm.stats().num_requests == 0


def test_a_forgotten_stream_that_is_collected_inside_a_step_harms_nothing() -> None:
    """A generator in a reference cycle is closed whenever the collector runs: also between two lines of a step."""
    runner = MockRunner()
    with make_llm(runner) as llm:
        cycle: list[Any] = [llm.stream(PROMPTS, greedy(100))]
        cycle.append(cycle)
        next(cycle[0])
        forward, steps = runner.forward, []

        def collecting(packed: Any) -> Any:
            steps.append(packed)
            if len(steps) == 3:
                gc.collect()
            return forward(packed)

        runner.forward = collecting  # type: ignore[method-assign]
        gc.disable()
        try:
            del cycle
            assert llm.generate("hello", greedy(6))[0].token_ids == answer("hello", greedy(6))
        finally:
            gc.enable()
        assert len(steps[2].lanes) == 5
        assert len(steps[3].lanes) == 1
        assert_idle(llm.engine)


def test_an_interrupted_generate_lets_go_and_others_go_on() -> None:
    runner = MockRunner()
    with make_llm(runner) as llm:
        stream = llm.stream("hello", greedy(8))
        got = list(next(stream).token_ids)
        forward, calls = runner.forward, []

        def interrupted(packed: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return forward(packed)

        runner.forward = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["world", "how"], greedy(50))
        got += [t for d in stream for t in d.token_ids]
        assert got == answer("hello", greedy(8))
        assert_idle(llm.engine)
        assert not llm._mail


# ---------------------------------------------------------------------------------------- closing


def test_closing_twice_is_safe_and_use_after_close_is_an_error() -> None:
    runner = SpyRunner()
    llm = make_llm(runner)
    with llm:
        pass
    llm.close()
    llm.close()
    assert runner.num_closed == 1
    for call in (llm.generate, llm.stream):
        with pytest.raises(EngineClosed, match="the engine is closed; create a new one"):
            call("hello", greedy())
    with pytest.raises(EngineClosed):
        llm.chat([{"role": "user", "content": "hello"}])
    assert not llm.health().is_live


def test_closing_during_a_stream_ends_it() -> None:
    llm = make_llm()
    stream, unread = llm.stream(PROMPTS, greedy(100)), llm.stream("hello", greedy())
    next(stream)
    llm.close()
    rest = list(stream)
    ends = [d for d in rest if d.finish is not None]
    assert [d.finish for d in ends] == [Finish.ABORT] * 4
    with pytest.raises(EngineClosed):
        next(unread)


def test_a_context_manager_closes_also_after_an_error() -> None:
    runner = SpyRunner()
    with pytest.raises(ZeroDivisionError), make_llm(runner):
        raise ZeroDivisionError
    assert runner.num_closed == 1


# ---------------------------------------------------------------------------------------- threads


def test_many_threads_may_call_at_once() -> None:
    got: dict[int, list[list[int]]] = {}
    with make_llm(MockRunner(script=Script(delay=0.001)), max_num_seqs=8) as llm:

        def work(i: int) -> None:
            got[i] = [llm.generate(p, greedy(5 + i))[0].token_ids for p in PROMPTS]
            got[i] += [[t for d in llm.stream(p, greedy(5 + i)) for t in d.token_ids] for p in PROMPTS]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert_idle(llm.engine)
    assert got == {i: [answer(p, greedy(5 + i)) for p in PROMPTS * 2] for i in range(6)}


def test_a_thread_that_steps_shuts_out_no_other() -> None:
    """Ten short calls take a few steps each while another thread steps without a pause; counted, not timed."""
    with make_llm(MockRunner(script=Script(delay=0.001)), max_num_seqs=4) as llm:
        long = threading.Thread(target=llm.generate, args=("hello", greedy(3000)))
        long.start()
        while llm.stats().num_steps < 5:
            time.sleep(0.001)
        before = llm.stats().num_steps
        for _ in range(10):
            assert llm.generate("world", greedy(1))[0].token_ids == answer("world", greedy(1))
        assert llm.stats().num_steps - before <= 60
        llm.close()
        long.join(30)
        assert not long.is_alive()


class BlockingRunner(RemoteRunner):
    """A remote runner whose steps wait for events that hardly ever come; `wake` ends them."""

    def __init__(self) -> None:
        super().__init__(vocab_size=125)
        self.woken = threading.Event()
        self.num_steps = 0

    def execute(self, batch: Batch) -> list[SeqOutput]:
        self.num_steps += 1
        # A request of one token is answered at once, all others never.
        if all(s.sampling.params.max_tokens != 1 for s in batch.seqs):
            self.woken.wait(0.05)
            self.woken.clear()
        if self.num_steps > 200:
            raise RunnerDead("one thread steps for ever")
        return [SeqOutput((5,)) if s.sampling.params.max_tokens == 1 else SeqOutput() for s in batch.seqs]

    def wake(self) -> None:
        self.woken.set()


class SlowLock:
    """A lock whose waiters are slow to notice that it is free, as locks are on a busy machine."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.release = self._lock.release

    def acquire(self) -> None:
        while not self._lock.acquire(blocking=False):
            time.sleep(0.002)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


def test_a_step_that_waits_for_a_remote_shuts_out_nobody() -> None:
    runner = BlockingRunner()
    llm = LLM.from_components(runner, SimpleBPETokenizer())
    llm._lock = SlowLock()  # type: ignore[assignment]
    outputs: list[Output] = []
    waiting = threading.Thread(target=lambda: outputs.extend(llm.generate("hello", greedy(50))))
    waiting.start()
    while not runner.num_steps:
        time.sleep(0.001)
    for _ in range(5):  # each waits for one event of the other at most when it comes, and one when it is answered
        assert llm.generate("world", greedy(1))[0].token_ids == [5]
    assert runner.num_steps < 50
    llm.close()
    waiting.join(30)
    assert not waiting.is_alive()
    assert [o.finish for o in outputs] == [Finish.ABORT]


class LastWords(RemoteRunner):
    """A remote that gives requests of two tokens one a step, and blocks until woken when only others are left."""

    def __init__(self) -> None:
        super().__init__(vocab_size=125)
        self.woken, self.is_blocked = threading.Event(), threading.Event()
        self.num_returned = 0  # from a block

    def execute(self, batch: Batch) -> list[SeqOutput]:
        if all(s.sampling.params.max_tokens != 2 for s in batch.seqs):
            self.is_blocked.set()
            self.woken.wait(20)
            self.num_returned += 1
        return [SeqOutput((5,)) if s.sampling.params.max_tokens == 2 else SeqOutput() for s in batch.seqs]

    def wake(self) -> None:
        if self.is_blocked.is_set():
            self.woken.set()


def test_what_has_arrived_is_read_while_another_threads_step_blocks() -> None:
    runner = LastWords()
    llm = LLM.from_components(runner, SimpleBPETokenizer())
    stream = llm.stream("world", greedy(2))
    first = next(stream)
    other = threading.Thread(target=lambda: llm.generate("hello", greedy(50)))
    other.start()  # its first step brings the stream's last token, its second one blocks
    assert runner.is_blocked.wait(30)
    assert [d.token_ids for d in (first, *stream)] == [(5,), (5,)]
    assert runner.num_returned == 0
    llm.close()
    other.join(30)
    assert not other.is_alive()


def test_closing_from_another_thread_ends_a_generate() -> None:
    llm = make_llm(MockRunner(script=Script(delay=0.001)))
    outputs: list[Output] = []
    thread = threading.Thread(target=lambda: outputs.extend(llm.generate(PROMPTS, greedy(2000))))
    thread.start()
    while llm.stats().num_steps < 5:
        time.sleep(0.001)
    llm.close()
    thread.join(30)
    assert not thread.is_alive()
    assert [o.finish for o in outputs] == [Finish.ABORT] * 4


# ------------------------------------------------------------------------------------------- rest


def test_the_bar_never_writes_to_stdout(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with make_llm() as llm:
        llm.generate(PROMPTS, greedy(), show_progress=True)
        assert capsys.readouterr() == ("", "")  # stderr is no terminal here
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        llm.generate(PROMPTS, greedy(), show_progress=True)
        out, err = capsys.readouterr()
        assert out == ""
        assert "(4/4," in err
        assert "inf" not in err
        assert "nan" not in err
        llm.generate(PROMPTS, greedy(), show_progress=False)
        assert capsys.readouterr() == ("", "")


def test_two_engines_in_one_process_do_not_know_each_other() -> None:
    with make_llm(MockRunner(seed=1)) as one, make_llm(MockRunner(seed=2), max_num_seqs=1) as two:
        streams = [llm.stream(p, greedy(7)) for p in PROMPTS for llm in (one, two)]
        got: list[list[int]] = [[] for _ in streams]
        for _ in range(3):
            for i, stream in enumerate(streams):
                got[i] += next(stream).token_ids
        for i, stream in enumerate(streams):
            got[i] += [t for d in stream for t in d.token_ids]
        assert got == [expected(TOKENIZER.encode(p), 7, seed=seed) for p in PROMPTS for seed in (1, 2)]
        one.close()
        assert two.generate("hello", greedy(3))[0].token_ids == expected(TOKENIZER.encode("hello"), 3, seed=2)


def test_the_stats_of_a_call() -> None:
    with make_llm() as llm:
        [output] = llm.generate("hello world", greedy(5))
        assert output.stats.num_prompt_tokens == len(TOKENIZER.encode("hello world"))
        assert output.stats.num_output_tokens == 5
        totals = llm.stats()
        assert (totals.num_requests, totals.num_steps, totals.num_decode_tokens) == (1, 5, 4)
        assert totals.num_prefill_tokens == output.stats.num_prompt_tokens
        assert llm.info.vocab_size == 125
        assert llm.tokenizer is not None
