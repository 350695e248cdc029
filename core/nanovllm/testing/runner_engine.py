"""The runner suite's tests through an engine, for every kind of runner.

Of a runner that returns logits, every row that was sampled is held against its context alone; of one that draws
tokens itself, every token. So answers may differ where rounding decides, and never elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from ..batch import ALL_PARAMETERS, Paged, Remote, RunnerInfo
from ..components import Components, build
from ..config import Loaded
from ..errors import RequestError
from ..request import Completion, Prompt, Request, SamplingParams
from ..runner import LogitsRunner
from .leaks import holdings, left_over, num_entries
from .runner_alone import Alone
from .runner_suite import Reference, RunnerSuite
from .suite import level
from .trial import Trial

# A value that is not the default, of each parameter.
_CHANGED: Mapping[str, Any] = {
    "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.1,
    "frequency_penalty": 0.1, "logit_bias": {0: 1.0}, "seed": 1, "max_tokens": 5, "min_tokens": 1, "stop": ("x",),
    "stop_token_ids": (0,), "ignore_eos": True, "logprobs": 1, "prompt_logprobs": 1,
}  # fmt: skip


class EngineTests(RunnerSuite):
    @level("basic")
    def test_a_step_leaves_stdout_alone(
        self, parts: Components, info: RunnerInfo, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Its very first one also, so this test comes first."""
        with Trial(request.getfixturevalue("working")) as trial:
            trial.answer(["a" if info.vocab_size is None else (0,)], [self.params(info, max_tokens=2)])
        printed = capfd.readouterr().out
        assert not printed, f"it wrote to stdout, which belongs to the answers: {printed.splitlines()[0]!r:.80}"

    # ------------------------------------------------------------------------------------- basic: right tokens

    @level("basic")
    def test_greedy_tokens_are_the_references(
        self, working: Components, info: RunnerInfo, prompts: list[Prompt], reference: Reference | None
    ) -> None:
        """Each is the reference's best behind the tokens before it, or one that `atol` could make the best."""
        if reference is None:
            pytest.skip("the suite has no reference")
        self.skip_unless(info.vocab_size is not None, "the runner knows no token ids")
        with Trial(working) as trial:
            for prompt, done in zip(prompts, trial.answer(prompts, [self.params(info)] * len(prompts)), strict=True):
                assert done.error is None, f"a request failed: {done.error}"
                tokens = [*map(int, prompt), *done.token_ids]  # type: ignore[arg-type]
                rows = reference(tokens)[len(prompt) - 1 : -1]
                for n, (token, row) in enumerate(zip(done.token_ids, rows, strict=True), 1):
                    short = row.max() - row[token]
                    assert short <= 2 * self.atol, (
                        f"token {n} of an answer is {token}, which the reference puts {short:.3g} below {row.argmax()}"
                    )

    @level("basic")
    def test_tokens_are_ids(self, working: Components, info: RunnerInfo, prompts: list[Prompt]) -> None:
        self.skip_unless(info.vocab_size is not None, "the runner knows no token ids")
        assert info.vocab_size is not None
        with Trial(working) as trial:
            deltas = trial.deltas(Request(prompt=prompts[0], params=self.params(info)))
        tokens = [token for delta in deltas for token in delta.token_ids]
        kinds = {type(token).__name__ for token in tokens} - {"int"}
        assert not kinds, f"its tokens are of type {kinds.pop()}, and not int, which becomes JSON"
        outside = [token for token in tokens if not 0 <= token < info.vocab_size]
        assert not outside, f"it gave token {outside[0]} of a vocabulary of {info.vocab_size}"

    @level("basic")
    def test_end_tokens_are_the_references(self, info: RunnerInfo, numpy_parts: Components) -> None:
        """Where they are missing, answers do not end; the tokenizer's own files need not know them."""
        known = numpy_parts.runner.info
        self.skip_unless(known.vocab_size == info.vocab_size, "the reference has another vocabulary")
        assert set(info.eos_ids) == set(known.eos_ids), (
            f"info.eos_ids is {sorted(info.eos_ids)} where the model's files name {sorted(known.eos_ids)}"
        )

    @level("basic")
    def test_it_honours_the_parameters_that_it_declares(
        self, working: Components, info: RunnerInfo, prompts: list[Prompt]
    ) -> None:
        """Those of which it is known what they do whatever the logits are; else the engine's sampler sees to them."""
        self.skip_unless(not isinstance(working.runner, LogitsRunner), "the engine's sampler honours them")
        with Trial(working, prefix_caching=False) as trial:

            def answer(**wanted: Any) -> Completion:
                [done] = trial.answer(prompts[:1], [self.params(info, **wanted)])
                assert done.error is None, f"a request with {wanted} failed: {done.error}"
                return done

            greedy = answer()
            for name, value in (("top_k", 1), ("top_p", 1e-6), ("min_p", 1.0)):
                if {name, "seed"} <= info.supports:
                    done = answer(temperature=2.0, seed=1, **{name: value})
                    is_best = (done.token_ids, done.text) == (greedy.token_ids, greedy.text)
                    assert is_best, f"with {name}={value} it gives other tokens than the most likely: is it honoured?"
            if "logit_bias" in info.supports and greedy.token_ids:
                token = greedy.token_ids[0]
                done = answer(logit_bias={token: -100.0})
                assert token not in done.token_ids, f"logit_bias of -100 does not keep token {token} away"
            if "logprobs" in info.supports and greedy.token_ids:
                found = answer(logprobs=2).logprobs or ()
                tokens = tuple(logprob.token_id for logprob in found)
                assert tokens == tuple(greedy.token_ids), f"with logprobs=2, those of {len(tokens)} tokens are there"
                wrong = [p for p in found if len(p.top) != 2 or p.rank != 1 or p.logprob > 0]
                assert not wrong, f"with logprobs=2 the most likely token has {wrong[0]}"

    # ---------------------------------------------------------------------------- batched: alone == in a crowd

    @level("batched")
    def test_requests_in_a_crowd_are_answered_as_alone(
        self, working: Components, info: RunnerInfo, prompts: list[Prompt], alone: Alone
    ) -> None:
        """More of them than lanes, of different lengths, so that they join and leave."""
        many = prompts * (1 + 2 * info.max_num_seqs // len(prompts)) if info.max_num_seqs <= 32 else prompts * 3
        with Trial(working, prefix_caching=False) as trial:
            trial.answer(many, [self.params(info, max_tokens=2 + i % 9) for i in range(len(many))])
        alone.check_answers(trial, self.rounding)

    # --------------------------------------------------------------------------------- paged: what engines do

    @level("paged")
    def test_prompts_in_chunks_are_answered_as_alone(
        self, working: Components, info: RunnerInfo, prompts: list[Prompt], alone: Alone
    ) -> None:
        self.skip_unless(not isinstance(info.kv, Remote), "the runner's KV cache is elsewhere")
        self.skip_unless(info.can_chunk, "the runner declares that it cannot chunk")
        with Trial(working, max_num_batched_tokens=info.max_num_seqs + 1, prefix_caching=False) as trial:
            trial.answer(prompts, [self.params(info)] * len(prompts))
        alone.check_answers(trial, self.rounding)

    @level("paged")
    def test_cached_prefixes_are_answered_as_alone(
        self, working: Components, info: RunnerInfo, texts: list[tuple[int, ...]], alone: Alone
    ) -> None:
        self.skip_unless(isinstance(info.kv, Paged), "the runner's KV cache is not paged")
        self.skip_unless(info.can_resume_prefix, "the runner declares that it cannot resume a prefix")
        assert isinstance(info.kv, Paged)
        longest = max(texts, key=len)
        self.skip_unless(len(longest) > info.kv.block_size, "no text is longer than a block")
        beginnings = [longest[:n] for n in range(info.kv.block_size + 1, len(longest) - 8, 5)] or [longest[:-1]]
        with Trial(working) as trial:
            for prompt in (*reversed(beginnings), *beginnings):
                trial.add(prompt, self.params(info))
                trial.step()
            trial.finish()
            assert trial.engine.stats().num_cached_tokens > 0, "no prefix was taken from the cache"
        alone.check_answers(trial, self.rounding)

    @level("paged")
    def test_preempted_requests_are_answered_as_alone(
        self, working: Components, info: RunnerInfo, texts: list[tuple[int, ...]], alone: Alone
    ) -> None:
        """In a pool that holds one and a half of them at their full length."""
        self.skip_unless(isinstance(info.kv, Paged), "the runner's KV cache is not paged")
        assert isinstance(info.kv, Paged)
        size, longest = info.kv.block_size, max(map(len, texts))
        num_prompt = longest // 2
        self.skip_unless(longest - num_prompt > size, "no text is longer than two blocks")
        tight = Paged(size, -(-longest // size) * 3 // 2)
        long = [text[:num_prompt] for text in texts if len(text) >= num_prompt]
        with Trial(working, kv=tight) as trial:
            trial.answer(long, [self.params(info, max_tokens=longest - num_prompt)] * len(long))
            assert trial.engine.stats().num_preemptions > 0, "nothing was preempted"
        alone.check_answers(trial, self.rounding)

    # ------------------------------------------------------------------------------------------- robust

    @level("robust")
    def test_an_error_of_one_request_changes_no_other(
        self, working: Components, info: RunnerInfo, prompts: list[Prompt], alone: Alone
    ) -> None:
        with Trial(working, prefix_caching=False) as trial:
            self.skip_unless(trial.witness is not None, "it draws tokens by itself, so none can be made to fail")
            assert trial.witness is not None
            trial.witness.failing = tuple(prompts[0])  # type: ignore[arg-type]
            first, *others = trial.answer(prompts, [self.params(info)] * len(prompts))
            assert first.error is not None, "the error of a request got lost"
            wrong = [done.error for done in others if done.error is not None]
            assert not wrong, f"the error of a request ended another: {wrong[0]}"
            later = trial.answer(prompts[1:], [self.params(info)] * (len(prompts) - 1))
            assert all(done.error is None for done in later), "the engine does not go on after an error"
        alone.check_answers(trial, self.rounding)

    @level("robust")
    def test_aborting_a_request_changes_no_other(
        self, working: Components, info: RunnerInfo, prompts: list[Prompt], alone: Alone
    ) -> None:
        """At several points of its life; who comes next gets its lane and its blocks."""
        with Trial(working, prefix_caching=False) as trial:
            for num_steps in range(4):
                asked = [trial.add(prompt, self.params(info)) for prompt in prompts[:4]]
                for _ in range(num_steps):
                    trial.step()
                for request_id in asked[::2]:
                    trial.engine.abort(request_id)
                trial.add(prompts[0], self.params(info))
                trial.finish()
        alone.check_answers(trial, self.rounding)

    @level("robust")
    def test_closing_twice(self, loaded: Loaded, working: Components, info: RunnerInfo, prompts: list[Prompt]) -> None:
        """After a request that ended, and one that did not; threads, files and processes are gone afterwards."""
        before = holdings()
        own = build(loaded)
        try:
            with Trial(own) as trial:
                trial.answer(prompts[:1], [self.params(info)])
                trial.add(prompts[0], self.params(info))
                trial.step()
            own.runner.close()
        finally:
            own.runner.close()
        del own, trial
        left = left_over(before)
        assert not left, f"after it was closed, there are more {left} than before"

    @level("robust")
    def test_hundreds_of_requests_leave_nothing_behind(
        self, working: Components, info: RunnerInfo, prompts: list[Prompt]
    ) -> None:
        """Counts threads, files, processes, and the entries of all lists and dictionaries of this process."""
        short = min(prompts, key=len)
        num = 8 * min(info.max_num_seqs, 8)
        with Trial(working, prefix_caching=False) as trial:

            def ask() -> None:
                trial.answer([short] * num, [self.params(info, max_tokens=2)] * num)
                trial.asked.clear()
                trial.answers.clear()
                if trial.witness is not None:
                    trial.witness.rows.clear()
                    trial.witness.drawn.clear()

            ask()
            before, steps, sizes = holdings(), [trial.engine.stats().num_steps], [num_entries()]
            for _ in range(2):
                ask()
                ask()
                steps.append(trial.engine.stats().num_steps)
                sizes.append(num_entries())
        left = left_over(before, pooled=min(info.max_num_seqs, 8))
        assert not left, f"{4 * num} requests leave {left} behind"
        more = min(sizes[1] - sizes[0], sizes[2] - sizes[1])
        num_steps = min(steps[1] - steps[0], steps[2] - steps[1])
        assert more < min(num, num_steps), (
            f"{2 * num} requests in {num_steps} steps leave {more} entries in lists and dictionaries, each time"
        )

    @level("robust")
    def test_unsupported_parameters_are_refused_at_the_door(
        self, working: Components, info: RunnerInfo, prompts: list[Prompt]
    ) -> None:
        with Trial(working) as trial:
            for name in sorted(ALL_PARAMETERS - {"max_tokens"}):
                request = Request(prompt=prompts[0], params=SamplingParams(**{name: _CHANGED[name]}))
                if name in info.supports:
                    trial.engine.prepare(request)
                else:
                    with pytest.raises(RequestError, match=name):
                        trial.engine.prepare(request)

    # ------------------------------------------------------------------------------------- deterministic

    @level("deterministic")
    def test_seeds_decide_the_answers(
        self, working: Components, info: RunnerInfo, prompts: list[Prompt], alone: Alone
    ) -> None:
        """The same seed gives the same answer again, and in a crowd what it gives alone; other seeds give others."""
        params = [self.params(info, temperature=2.0, seed=i, max_tokens=12) for i in range(6)]
        same = [max(prompts, key=len)] * len(params)
        answers = []
        for _ in range(2):
            with Trial(working, prefix_caching=False) as trial:
                answers.append([(done.token_ids, done.text) for done in trial.answer(same, params)])
            alone.check_answers(trial, self.rounding)
        assert answers[0] == answers[1], "the same seeds gave other answers when they were asked again"
        assert len(set(answers[0])) > 1, "six seeds gave one and the same answer"
        with Trial(working, prefix_caching=False) as trial:
            deltas = trial.deltas(Request(prompt=same[0], params=params[1], n=4))
        several = {delta.output.text for delta in deltas if delta.output is not None}
        assert len(several) > 1, "four completions of one request with a seed are one and the same"
        if info.batch_invariant:
            by_itself = [alone.answer(prompt, p) for prompt, p in zip(same, params, strict=True)]
            assert answers[0] == by_itself, "a seed gives another answer in a crowd than alone"

    # -------------------------------------------------------------------------------------------------- fast

    @level("fast")
    def test_speed(
        self,
        working: Components,
        info: RunnerInfo,
        prompts: list[Prompt],
        request: pytest.FixtureRequest,
        record_property: Callable[[str, object], None],
    ) -> None:
        """Says how fast it is, and asserts nothing about it: a machine that others use decides."""
        params = [self.params(info, max_tokens=16)] * len(prompts)

        def tokens_per_second(of: Components) -> float:
            with Trial(of, prefix_caching=False) as trial:
                started = time.perf_counter()
                done = trial.answer(prompts, params)
                return sum(len(answer.token_ids) for answer in done) / (time.perf_counter() - started)

        try:
            reference = request.getfixturevalue("numpy_parts")
        except pytest.skip.Exception:
            speed = max(tokens_per_second(working) for _ in range(3))
            record_property("note", f"{speed:.0f} tokens/s for {len(prompts)} requests at once")
            return
        pairs = [(tokens_per_second(working), tokens_per_second(reference)) for _ in range(3)]
        own, numpys = map(max, zip(*pairs, strict=True))
        record_property("note", f"{own / numpys:.2f} times the speed of the NumPy runner ({own:.0f} tokens/s)")
