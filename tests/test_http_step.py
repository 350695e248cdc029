"""Step mode: nanovllm in front of nanovllm gives what nanovllm alone gives, whatever happens in between."""

from __future__ import annotations

import json
from typing import Any

import pytest

from http_support import Asked, ScriptedServer, Wire, nothing_left
from nanovllm import LLM, SamplingParams
from nanovllm.batch import Remote
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm.engine import Engine
from nanovllm.errors import RequestError, RequestFailed
from nanovllm.request import Finish, Request
from nanovllm.testing import alone
from nanovllm_server.limits import Limits
from server_support import Served, serving
from support import DATA, needs_data


def through(url: str, **runner: Any) -> LLM:
    """An engine in front of the server."""
    sections: dict[str, Any] = {"runner": {"type": "http", "url": url, **runner}, "tokenizer": "simple"}
    return LLM.from_config(None, model="remote", **sections)


def greedy(max_tokens: int = 8, **more: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **more})


def answers(llm: LLM, prompts: list[Any], params: Any, **options: Any) -> list[Any]:
    """Everything that a user sees of an answer, times aside."""
    return [
        [(c.token_ids, c.text, c.finish, c.stop_reason, c.logprobs) for c in output.completions]
        + [output.prompt_logprobs]
        for output in llm.generate(prompts, params, **options)
    ]


PROMPTS = [
    "hello world",
    "what can you do",
    "hello world",
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21],
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=20, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=1, seed=5, max_tokens=30, repetition_penalty=1.3, presence_penalty=0.5, min_tokens=4),
    SamplingParams(temperature=0.8, seed=6, max_tokens=12, top_k=20, top_p=0.9, min_p=0.01, stop=["e", "world"]),
    SamplingParams(temperature=1.5, seed=7, max_tokens=25, logit_bias={7: 30.0}, stop_token_ids=[9, 10], logprobs=0),
]


def test_everything_that_a_request_may_say_gives_what_it_gives_here() -> None:
    with serving() as served, through(served.url) as remote, LLM.from_config(None, runner="mock") as local:
        assert isinstance(remote.info.kv, Remote)
        assert remote.info.vocab_size == 125
        assert remote.engine.eos_ids == local.engine.eos_ids
        assert answers(remote, PROMPTS, PARAMS, n=2) == answers(local, PROMPTS, PARAMS, n=2)


@needs_data
def test_greedy_stories_over_http_are_the_references() -> None:
    from nanovllm.aio import AsyncLLM

    directory = DATA / "checkpoints" / "stories260k"
    reference = json.loads((directory / "reference.json").read_text())
    llm = AsyncLLM.from_config(None, model=str(directory), runner="numpy")
    with serving(llm=llm) as served:
        sections: dict[str, Any] = {
            "runner": {"type": "http", "url": served.url},
            "tokenizer": {"path": str(directory)},
        }
        with LLM.from_config(None, model="remote", **sections) as remote:
            cases = reference["cases"]
            outputs = remote.generate([c["input_ids"] for c in cases], greedy(60))
            assert [list(o.token_ids) for o in outputs] == [c["greedy_new_ids"] for c in cases]


# ------------------------------------------------------------------------------ calls and connections


def test_a_step_is_one_call_whatever_the_batch_on_one_connection_for_the_whole_run() -> None:
    with serving() as served, through(served.url) as remote:
        before = len(served.paths)
        remote.generate([f"hello {word}" for word in "abcdefgh"], greedy(100))
        steps = remote.stats().num_steps
        assert steps >= 100
        calls = served.paths[before:]
        assert calls == ["/v1/inference"] * (steps + 1), "one more tells that all is over"
        assert len(served.connections) == 1
        assert max(len(step["sequences"]) for step in served.steps) == 8
        # What all is over for is held no longer.
        assert served.stepper.num_held == 0


def test_a_decode_step_does_not_grow_with_the_context() -> None:
    with serving() as served, through(served.url) as remote:
        remote.generate([[7] * 3000], greedy(20))
        sizes = [len(body) for body in served.bodies if b'"sequences":[{' in body]
        assert sizes[0] > 6000
        assert max(sizes[1:]) < 200


def test_what_is_over_is_told_with_the_next_step() -> None:
    with serving() as served, through(served.url) as remote:
        remote.generate(["hello", "world"], [greedy(3), greedy(6)])
        released = [step.get("release", []) for step in served.steps]
        assert [len(r) for r in released if r] == [1, 1]
        assert released[3], "the step after its last token"
        assert not served.steps[-1]["sequences"]


def test_a_long_prompt_of_one_does_not_hold_up_the_decode_of_another() -> None:
    slow = MockRunner(
        script=Script(delay=0.03)
    )  # 13 steps for the long prompt: a machine under load has time to answer
    with serving(slow, max_num_batched_tokens=32) as served, through(served.url) as remote:
        engine = remote.engine
        first = engine.add(Request(prompt=[5] * 4, params=greedy(5)))
        engine.step()
        second = engine.add(Request(prompt=[6] * 400, params=greedy(3)))
        engine.step()  # not nearly enough for 400 tokens
        assert [t.sequences[0].num_output for t in (first, second)] == [2, 0]
        while engine.has_work:
            engine.step()
        assert list(second.sequences[0].output_ids) == alone([6] * 400, greedy(3))


def test_a_prompt_that_takes_several_calls_is_scored_all_the_same() -> None:
    """The first answers are empty, because another sequence does not wait for this one's prompt."""
    params = greedy(2, prompt_logprobs=1)
    slow = MockRunner(script=Script(delay=0.03))
    with serving(slow, max_num_batched_tokens=32) as served, through(served.url) as remote:
        engine = remote.engine
        engine.add(Request(prompt=[5] * 4, params=greedy(40)))
        engine.step()
        scored = engine.add(Request(prompt=[6, 7] * 200, params=params))
        done = []
        while not done:
            done = [d.output for d in engine.step() if d.output is not None and d.request_id == scored.request_id]
        assert (done[0].error, len(served.steps) > 3) == (None, True)
        with LLM.from_config(None, runner="mock") as local:
            (want,) = local.generate([[6, 7] * 200], params)
        assert scored.output(done).prompt_logprobs == want.prompt_logprobs


# ------------------------------------------------------------------------------------ what goes wrong


def test_a_server_that_has_forgotten_is_told_all_and_goes_on_with_the_same_tokens() -> None:
    with (
        serving(max_num_seqs=4) as served,
        through(served.url) as remote,
        LLM.from_config(None, runner="mock") as local,
    ):
        want = answers(local, PROMPTS, PARAMS)
        engine = remote.engine
        tickets = [engine.add(Request(prompt=p, params=q)) for p, q in zip(PROMPTS, PARAMS, strict=True)]
        done: dict[int, Any] = {}
        while engine.has_work:
            for delta in engine.step():
                if delta.output is not None:
                    done[delta.request_id] = delta.output
            served.forget_idle()
        got = [done[t.request_id] for t in tickets]
        assert [[(c.token_ids, c.text, c.finish, c.stop_reason, c.logprobs)] for c in got] == [w[:1] for w in want]
        assert tickets[0].output([got[0]]).prompt_logprobs == want[0][1], "scored once, by the first who saw the prompt"


@pytest.mark.parametrize("losses", [["before"], ["after"], ["cut"], ["after", "after", "cut", "before"]])
def test_a_lost_question_or_answer_changes_no_token(losses: list[str]) -> None:
    params = greedy(24, temperature=1.0, seed=3, repetition_penalty=1.4)
    with serving() as served, between(served, losses) as proxy, through(proxy.url, retries=9) as remote:
        remote.engine.runner._servers.transports[0].backoff.first = 0.001  # type: ignore[attr-defined]
        outputs = remote.generate([[5, 6], [7, 8]], params)
        assert [o.token_ids for o in outputs] == [alone(ids, params) for ids in ([5, 6], [7, 8])]


def between(served: Served, losses: list[str]) -> ScriptedServer:
    """A proxy that loses every step's first calls: before the server sees them, after that, or in mid-answer."""
    left: list[str] = list(losses)

    def handler(asked: Asked, wire: Wire) -> None:
        nonlocal left
        is_step = asked.path == "/v1/inference" and b'"id":' in asked.body
        loss = left.pop(0) if is_step and left else None
        if loss is None:
            left = list(losses)
        if loss == "before":
            wire.reset()
            return
        status, body = served.call(asked.method, asked.path, asked.body or None)
        if loss == "after":
            wire.reset()
        elif loss == "cut":
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
            wire.close()
        else:
            wire.raw(body, status)

    return ScriptedServer(handler)


def test_a_connection_that_the_server_has_closed_in_silence_is_opened_again() -> None:
    with serving() as served:

        def handler(asked: Asked, wire: Wire) -> None:
            status, body = served.call(asked.method, asked.path, asked.body or None)
            wire.raw(body, status)
            wire.close()  # without having said so

        with ScriptedServer(handler) as proxy, through(proxy.url) as remote:
            assert remote.generate([[5, 6, 7]], greedy(6))[0].token_ids == alone([5, 6, 7], greedy(6))
            assert proxy.num_connections > 6


def test_an_error_of_one_sequence_ends_that_one() -> None:
    runner = MockRunner(script=Script(nan_token=99))
    with serving(runner) as served, through(served.url) as remote:
        with pytest.raises(RequestFailed) as failed:
            remote.generate([[5, 6], [99, 5], [7, 8]], greedy(6))
        outputs = failed.value.outputs
        assert [o.finish for o in outputs] == [Finish.LENGTH, Finish.ERROR, Finish.LENGTH]
        assert "NaN" in outputs[1].error
        assert [outputs[0].token_ids, outputs[2].token_ids] == [alone([5, 6], greedy(6)), alone([7, 8], greedy(6))]
        assert remote.health().is_live


def test_an_aborted_request_is_over_on_the_server_too() -> None:
    with serving() as served, through(served.url) as remote:
        stream = remote.stream("hello world", greedy(1000))
        next(iter(stream))
        assert served.stepper.num_held == 1
        stream.close()
        assert served.stepper.num_held == 0


def test_a_server_that_dies_fails_what_runs_and_neither_the_engine_nor_what_comes_later() -> None:
    with nothing_left():
        with serving() as served:
            remote = through(served.url, retries=0)
            engine = remote.engine
            tickets = [engine.add(Request(prompt=[i, 5], params=greedy(50))) for i in (7, 8)]
            engine.step()
        for _ in range(4):  # as often as would make an engine give up on a runner
            engine.add(Request(prompt=[5], params=greedy(2)))
            deltas = engine.step()
            assert deltas
            assert all(d.finish is Finish.ERROR and served.url in (d.error or "") for d in deltas)
        assert all(t.sequences[0].finish is Finish.ERROR for t in tickets)
        assert remote.health().is_live
        remote.close()


# -------------------------------------------------------------------------- servers of the seeds' time


def old_server(path: str, vocab: int = 125, says: Any = None) -> tuple[ScriptedServer, list[Any]]:
    """As in the guide of nano-vllm-go: it takes whole contexts and knows nothing between two calls."""
    bodies: list[Any] = []

    def handler(asked: Asked, wire: Wire) -> None:
        if asked.path != path or asked.method != "POST":
            wire.json({"detail": "Not Found"}, 404)
            return
        bodies.append(asked.json)
        contexts = (
            [s["token_ids"] for s in asked.json["sequences"]] if path == "/v1/inference" else asked.json["token_ids"]
        )
        tokens = [alone(ids, greedy(1), vocab_size=vocab)[0] for ids in contexts]
        wire.json({"token_ids": tokens} if says is None or not contexts else says(tokens))

    return ScriptedServer(handler), bodies


@pytest.mark.parametrize("path", ["/v1/inference", "/inference"])
def test_a_server_without_the_extension_is_spoken_to_in_the_seeds_words(path: str) -> None:
    server, bodies = old_server(path)
    with server, through(server.url) as remote:
        outputs = remote.generate([[5, 6, 7], [8, 9]], greedy(9))
        assert [o.token_ids for o in outputs] == [alone([5, 6, 7], greedy(9)), alone([8, 9], greedy(9))]
        assert len(bodies) == 1 + remote.stats().num_steps
        assert server.num_connections == 1
        assert remote.info.supports == {"temperature", "max_tokens", "stop", "stop_token_ids", "ignore_eos"}
        with pytest.raises(RequestError, match="does not support top_k"):
            remote.generate("hello", SamplingParams(top_k=3))


def test_the_older_shape_has_room_for_one_temperature_so_there_is_a_call_for_each() -> None:
    server, bodies = old_server("/inference")
    with server, through(server.url) as remote:
        remote.generate([[5], [6], [7]], [greedy(1), greedy(1, temperature=0.5), greedy(1)])
    assert [(b["temperature"], b["token_ids"]) for b in bodies[1:]] == [(0.0, [[5], [7]]), (0.5, [[6]])]


@pytest.mark.parametrize(
    ("says", "error"),
    [
        (lambda tokens: {"token_ids": tokens[:-1]}, "does not hold token_ids for 2 sequences"),
        (lambda tokens: {"token_ids": [*tokens[:-1], 125]}, "the token 125 is none of a vocabulary of 125"),
        (lambda tokens: {"token_ids": [*tokens[:-1], True]}, "the token True is none"),
        (lambda tokens: {"token_ids": [*tokens[:-1], float("nan")]}, "the token nan is none"),
        (lambda tokens: {"tokens": tokens}, "does not hold token_ids"),
    ],
)
def test_a_wrong_answer_is_an_error_of_the_sequences_that_it_is_about(says: Any, error: str) -> None:
    server, _ = old_server("/v1/inference", says=says)
    with server, through(server.url) as remote:
        with pytest.raises(RequestFailed) as failed:
            remote.generate([[5], [6]], greedy(1))
        ends = [o.finish for o in failed.value.outputs]
        assert ends == (
            [Finish.LENGTH, Finish.ERROR] if "vocabulary" in error or "none" in error else [Finish.ERROR] * 2
        )
        assert error in (failed.value.outputs[1].error or "")
        assert remote.health().is_live


# ------------------------------------------------------------------------------------- several clients


def test_users_of_one_client_with_salts_of_their_own_share_no_prompt_on_the_server() -> None:
    with serving() as served, through(served.url) as remote:

        def num_cached(salt: str | None) -> int:
            before = served.llm.stats().num_cached_tokens
            [output] = remote.generate([[7] * 50], greedy(2), cache_salt=salt)
            assert list(output.token_ids) == alone([7] * 50, greedy(2))
            return served.llm.stats().num_cached_tokens - before

        assert [num_cached(salt) for salt in ("a", "b", None)] == [0, 0, 0]
        assert min(num_cached(salt) for salt in ("a", "b", None)) > 0


def test_clients_do_not_see_each_other() -> None:
    with serving(max_num_seqs=3) as served, through(served.url) as one, through(served.url) as two:
        engines: list[Engine] = [one.engine, two.engine]
        tickets = [e.add(Request(prompt=[i, 7, 7, 7], params=greedy(30))) for e in engines for i in (5, 6)]
        assert tickets[0].sequences[0].seq_id == tickets[2].sequences[0].seq_id, "the same names"
        while any(e.has_work for e in engines):
            for engine in engines:
                engine.step()
        for ticket in tickets:
            assert list(ticket.sequences[0].output_ids) == alone(ticket.prompt_ids, greedy(30))
        assert served.stepper.num_held == 0


def test_more_sequences_than_lanes_wait_their_turn() -> None:
    with serving(max_num_seqs=2, limits=Limits(max_wait=0.2)) as served, through(served.url) as remote:
        assert remote.engine.scheduler.max_num_seqs == 2
        prompts = [[i, 5, 5] for i in range(4, 11)]
        outputs = remote.generate(prompts, greedy(5))
        assert [o.token_ids for o in outputs] == [alone(p, greedy(5)) for p in prompts]
