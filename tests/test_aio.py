"""AsyncLLM: the same answers as LLM, and nobody waits for ever whatever goes away."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from engine_support import SpyRunner, assert_idle, greedy
from nanovllm import LLM, AsyncLLM, EngineClosed, EngineDead, Finish, RequestError, RequestFailed, SamplingParams, aio
from nanovllm.builtin.mock import MockRunner, Script, expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer

PROMPT = list(range(10, 30))
POISON = 99


def make_llm(runner: MockRunner | None = None, **options: Any) -> AsyncLLM:
    return AsyncLLM.from_components(runner or MockRunner(), SimpleBPETokenizer(), **options)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """asyncio.run with a limit, and with every stray task or never-awaited coroutine an error."""

    async def limited() -> None:
        await asyncio.wait_for(main(), 30)
        strays = asyncio.all_tasks() - {asyncio.current_task()}
        assert not strays, f"tasks left behind: {strays}"

    asyncio.run(limited())
    gc.collect()  # a forgotten coroutine complains when it is collected, which pytest turns into a failure


@pytest.fixture(autouse=True)
def _no_engine_thread_survives() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if thread.name == "nanovllm-engine":
            thread.join(10)
            assert not thread.is_alive(), "an engine thread is left behind"


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.001)


# ---------------------------------------------------------------------------------------- answers


def test_fifty_at_once_equal_the_synchronous_answers() -> None:
    prompts = [PROMPT[: 1 + i % 20] for i in range(50)]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=3 + i % 9, logprobs=1) for i in range(50)]
    with LLM.from_components(MockRunner(), SimpleBPETokenizer()) as llm:
        want = llm.generate(prompts, params)

    async def main() -> None:
        async with make_llm(max_num_seqs=8, max_num_batched_tokens=64) as llm:
            got = await asyncio.gather(*(llm.generate(p, x) for p, x in zip(prompts, params, strict=True)))
            assert [(o.text, o.token_ids, o.logprobs) for o in got] == [(o.text, o.token_ids, o.logprobs) for o in want]
            assert_idle(llm.engine)
            assert not llm._mail

    run(main)


def test_streams_join_to_the_text() -> None:
    async def main() -> None:
        async with make_llm() as llm:
            deltas = [d async for d in llm.stream(PROMPT, greedy(20), n=2)]
            for index in range(2):
                own = [d for d in deltas if d.completion_index == index]
                assert [t for d in own for t in d.token_ids] == expected(PROMPT, 20)
                assert own[-1].output is not None
                assert "".join(d.text for d in own) == own[-1].output.text
            output = await llm.chat([{"role": "user", "content": "hello"}], greedy(3))
            assert len(output.token_ids) == 3
            assert llm.stats().num_requests == 2
            assert llm.info.vocab_size == llm.tokenizer.vocab_size  # type: ignore[union-attr]

    run(main)


def test_a_slow_reader_gets_merged_deltas_and_stalls_nobody() -> None:
    async def main() -> None:
        async with make_llm() as llm:
            slow = llm.stream(PROMPT, greedy(200, logprobs=0))
            first = await anext(slow)
            # The other one is read to its end, and the slow one is computed meanwhile.
            assert (await llm.generate(PROMPT[:3], greedy(200))).token_ids == expected(PROMPT[:3], 200)
            await until(lambda: not llm.engine.has_work)
            rest = [d async for d in slow]
            assert len(rest) == 1, "what was not fetched is one delta, not a queue"
            assert [*first.token_ids, *rest[0].token_ids] == expected(PROMPT, 200)
            assert len(rest[0].logprobs or ()) == len(rest[0].token_ids)
            assert rest[0].output is not None
            assert first.text + rest[0].text == rest[0].output.text

    run(main)


def test_errors_reach_the_caller_that_they_concern() -> None:
    async def main() -> None:
        async with make_llm(MockRunner(script=Script(nan_token=POISON))) as llm:
            with pytest.raises(RequestError, match="the prompt is empty"):
                await llm.generate("")
            good, bad = await asyncio.gather(
                llm.generate(PROMPT, greedy()), llm.generate([POISON], greedy()), return_exceptions=True
            )
            assert isinstance(bad, RequestFailed)
            assert "NaN" in str(bad)
            assert bad.outputs[0].finish is Finish.ERROR
            assert not isinstance(good, BaseException)
            assert good.token_ids == expected(PROMPT, 8)

    run(main)


# ------------------------------------------------------------------------------------ going away


def steps_until_idle(runner: SpyRunner, llm: AsyncLLM) -> Callable[[], bool]:
    """Has the engine let go? For `until`."""
    return lambda: not llm.engine.has_work and not llm._mail


@pytest.mark.parametrize("how", ["cancel", "aclose", "break", "cancel at the door"])
def test_a_consumer_that_goes_away_gives_its_blocks_back_within_two_steps(how: str) -> None:
    runner = SpyRunner(script=Script(delay=0.002))

    async def main() -> None:
        async with make_llm(runner) as llm:
            if how.startswith("cancel"):
                task = asyncio.ensure_future(llm.generate(PROMPT, greedy(4000)))
                if how == "cancel":
                    await until(lambda: len(runner.steps) > 3)
                else:
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                stream = llm.stream(PROMPT, greedy(4000))
                async for _ in stream:
                    break
                if how == "aclose":
                    await stream.aclose()
                else:
                    del stream
                    gc.collect()
                    await asyncio.sleep(0)
            steps = len(runner.steps)
            await until(steps_until_idle(runner, llm))
            assert len(runner.steps) - steps <= 2
            assert_idle(llm.engine)
            assert (await llm.generate(PROMPT, greedy())).token_ids == expected(PROMPT, 8)

    run(main)


def test_an_event_loop_that_closes_takes_its_requests_with_it() -> None:
    runner = SpyRunner(script=Script(delay=0.002))
    llm = make_llm(runner)

    async def leave() -> None:
        stream = llm.stream(PROMPT, greedy(4000))
        await anext(stream)
        streams.append(stream)

    streams: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()  # rudely: no shutdown_asyncgens

    async def main() -> None:
        await until(steps_until_idle(runner, llm))
        assert_idle(llm.engine)
        assert (await llm.generate(PROMPT, greedy())).token_ids == expected(PROMPT, 8)
        await llm.close()

    run(main)


def test_two_event_loops_share_one_engine() -> None:
    llm = make_llm(MockRunner(script=Script(delay=0.001)))
    got: dict[int, list[list[int]]] = {}

    def work(i: int) -> None:
        async def main() -> None:
            outputs = await asyncio.gather(*(llm.generate(PROMPT[: i + j + 1], greedy(20)) for j in range(5)))
            got[i] = [o.token_ids for o in outputs]

        run(main)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == {i: [expected(PROMPT[: i + j + 1], 20) for j in range(5)] for i in range(3)}
    run(llm.close)


# ---------------------------------------------------------------------------------------- closing


def test_close_ends_what_runs() -> None:
    async def main() -> None:
        runner = SpyRunner(script=Script(delay=0.001))
        llm = make_llm(runner, max_num_seqs=2)
        tasks = [asyncio.ensure_future(llm.generate(PROMPT, greedy(4000))) for _ in range(5)]
        await until(lambda: len(runner.steps) > 3)
        late = asyncio.ensure_future(llm.generate(PROMPT, greedy(4000)))  # at the door when the engine closes
        await asyncio.gather(llm.close(), llm.close())
        ends = await asyncio.gather(*tasks, late, return_exceptions=True)
        assert [e.finish for e in ends[:5] if not isinstance(e, BaseException)] == [Finish.ABORT] * 5
        assert isinstance(ends[5], EngineClosed) or ends[5].finish is Finish.ABORT  # type: ignore[union-attr]
        assert runner.num_closed == 1
        for call in (llm.generate(PROMPT), llm.chat([{"role": "user", "content": "hello"}]), anext(llm.stream(PROMPT))):
            with pytest.raises(EngineClosed, match="create a new one"):
                await call
        assert not llm.health().is_live
        await llm.close()
        assert runner.num_closed == 1

    run(main)


def test_close_returns_although_a_step_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "CLOSE_SECONDS", 0.05)
    runner = SpyRunner(script=Script(hang_step=3))

    async def main() -> None:
        llm = make_llm(runner)
        task = asyncio.ensure_future(llm.generate(PROMPT, greedy()))
        await until(lambda: len(runner.steps) == 3)
        await llm.close()
        with pytest.raises(EngineClosed, match="hung"):
            await task
        assert not llm.health().is_live
        assert "hung" in (llm.health().reason or "")
        with pytest.raises(EngineClosed):
            await llm.generate(PROMPT)

    run(main)
    runner.close()  # the hang ends, and the thread that was left behind with it


def test_a_crash_of_the_engine_thread_fails_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SpyRunner()

    async def main() -> None:
        llm = make_llm(runner)
        step, calls = llm.engine.step, []

        def crash() -> Any:
            calls.append(1)
            if len(calls) > 3:
                raise SystemError("a bug")
            return step()

        monkeypatch.setattr(llm.engine, "step", crash)
        tasks = [asyncio.ensure_future(llm.generate(PROMPT, greedy(4000))) for _ in range(5)]
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(e) for e in ends] == [EngineDead] * 5
        assert "SystemError: a bug" in str(ends[0])
        health = llm.health()
        assert not health.is_live
        assert not health.is_ready
        assert "a bug" in (health.reason or "")
        with pytest.raises((EngineDead, EngineClosed)):
            await llm.generate(PROMPT)
        await llm.close()
        assert runner.num_closed == 1, "the runner is closed also when its engine crashed"

    run(main)


def test_an_engine_that_dies_between_the_check_and_the_add_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with make_llm() as llm:

            def refuse(ticket: Any) -> None:
                raise EngineDead("it just died")

            monkeypatch.setattr(llm.engine, "add", refuse)
            with pytest.raises(EngineDead, match="it just died"):
                await llm.generate(PROMPT, greedy())
            assert not llm._mail

    run(main)


def test_a_runner_that_dies_fails_all_who_wait() -> None:
    async def main() -> None:
        async with make_llm(MockRunner(script=Script(dead_step=4)), max_num_seqs=2) as llm:
            tasks = [asyncio.ensure_future(llm.generate(PROMPT, greedy(50))) for _ in range(5)]
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            # Those who came in time failed with the engine; later ones were turned away by it.
            assert {type(e) for e in ends} <= {RequestFailed, EngineDead}
            with pytest.raises(EngineDead):
                await llm.generate(PROMPT)
            assert not llm.health().is_live

    run(main)


def test_an_engine_that_nobody_asks_anything_closes_at_once() -> None:
    async def main() -> None:
        async with make_llm() as llm:
            assert llm.health().is_ready
            assert llm.health().seconds_without_progress is None
        assert llm.stats().num_steps == 0
        assert not llm._thread.is_alive()

    run(main)
