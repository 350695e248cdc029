"""`nanovllm runner-serve`: who is let in, what is taken, what is held, and that it starts and ends as a process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from app_support import command
from http_support import wait_until
from nanovllm import LLM, SamplingParams
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm.cli import cli
from nanovllm.errors import ConfigError
from nanovllm.testing import alone
from nanovllm_server.bind import bind
from nanovllm_server.keys import Keys, load_keys
from nanovllm_server.limits import Limits
from server_support import Served, serving
from support import REPO

KEY, OTHER = "k" * 20, "o" * 20
GREEDY = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def plain(*contexts: list[int], temperature: float = 0) -> dict[str, Any]:
    return {"sequences": [{"token_ids": ids, "temperature": temperature} for ids in contexts], "is_prefill": True}


def named(client: str, seq_id: int, token_ids: list[int], at: int | None = None, **start: Any) -> dict[str, Any]:
    """A step of version 1 for one sequence; from its beginning, unless `at` is given."""
    item: dict[str, Any] = {"id": seq_id, "at": at or len(token_ids), "token_ids": token_ids}
    if at is None:
        item |= {"temperature": 0, "num_prompt": len(token_ids), "index": 0, "seed": 1, "params": {}, **start}
    return {"version": 1, "client": client, "call": 1, "sequences": [item]}


# ------------------------------------------------------------------------------------------ who is let in


@pytest.mark.parametrize(
    "path",
    ["/info", "/v1/inference", "/inference", "/v1/tokenize", "/v1/vocabulary", "/docs", "/openapi.json", "/nothing",
     "//health", "/health/", "/HEALTH", "/livez/../info", "/health?x=/info&", "/", "//v1/inference", "/v1/inference/"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
def test_without_a_key_nothing_is_there_but_the_open_paths(gated: Served, method: str, path: str) -> None:
    is_open = path.partition("?")[0] in ("/health", "/livez")
    status, body = gated.call(method, path, b"{}" if method == "POST" else None)
    assert (status != 401) == is_open
    for header in ("Bearer wrong-wrong-wrong-wrong", f"Basic {KEY}", KEY, "Bearer ", f"Bearer {KEY}x"):
        assert (gated.call(method, path, Authorization=header)[0] != 401) == is_open
    assert KEY.encode() not in body


@pytest.fixture(scope="module")
def gated() -> Iterator[Served]:
    with serving(keys=Keys([KEY, OTHER])) as served:
        yield served


def test_with_a_key_everything_is_there_whatever_the_host_header_says(gated: Served) -> None:
    assert gated.call("GET", "/info", Authorization=f"Bearer {KEY}")[0] == 200
    assert gated.call("GET", "/info", Authorization=f"bearer  {OTHER}")[0] == 200
    for host in ("x/health?", "x/health#", "127.0.0.1/livez"):
        assert gated.call("GET", "/info", Host=host)[0] in (400, 401)
    assert gated.call("GET", "/health")[0] == 200


def test_a_client_with_a_key_steps_and_one_without_is_told_so(gated: Served, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    section = {"type": "http", "url": gated.url, "api_key_file": str(tmp_path / "key"), "dialect": "nanovllm"}
    with LLM.from_config(None, model="remote", runner=section, tokenizer="simple") as llm:
        assert llm.generate([[5, 6]], GREEDY)[0].token_ids == alone([5, 6], GREEDY)
    with pytest.raises(Exception, match="401"):
        LLM.from_config(None, model="remote", runner={"type": "http", "url": gated.url}, tokenizer="simple")


def test_keys_do_not_see_each_other_s_sequences_nor_whose_prompt_is_cached(gated: Served) -> None:
    mine, other = {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {OTHER}"}
    prompt = [5] * 50
    _, first = gated.post("/v1/inference", named("c", 1, prompt), **mine)
    [token] = first["token_ids"]
    again = named("c", 1, [token], at=51)
    assert gated.post("/v1/inference", again, **other)[1]["unknown"] == [1]
    assert "unknown" not in gated.post("/v1/inference", again, **mine)[1]
    cached = gated.llm.stats().num_cached_tokens
    gated.post("/v1/inference", named("d", 1, prompt), **other)
    assert gated.llm.stats().num_cached_tokens == cached
    gated.post("/v1/inference", named("d", 1, prompt), **mine)
    assert gated.llm.stats().num_cached_tokens > cached


def test_a_client_s_salts_keep_its_own_users_apart_and_are_not_another_key_s(gated: Served) -> None:
    mine, other = {"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Bearer {OTHER}"}
    prompt = [6] * 50

    def num_cached(seq_id: int, salt: str | None, who: dict[str, str]) -> int:
        before = gated.llm.stats().num_cached_tokens
        gated.post("/v1/inference", named("c", seq_id, prompt, cache_salt=salt), **who)
        return gated.llm.stats().num_cached_tokens - before

    assert num_cached(1, "a", mine) == 0
    assert num_cached(2, "b", mine) == 0
    assert num_cached(3, None, mine) == 0
    assert num_cached(4, "a", other) == 0
    assert num_cached(5, "a", mine) > 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds 0 keys"),
        ("# only a remark\n\n", "holds 0 keys"),
        (f"{KEY}\nshort\n", "line 2: a key has at least 16"),
        ("two words and more of them\n", "without spaces"),
    ],
)
def test_a_key_file_without_good_keys_starts_nothing(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as refused:
        load_keys(file, {})
    assert "short" not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_keys(tmp_path / "missing", {})


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{KEY}  # mine\n")
    keys = load_keys(tmp_path / "keys", {"NANOVLLM_API_KEY": OTHER})
    assert len(keys) == 2
    owners = {keys.owner(f"Bearer {key}".encode()) for key in (KEY, OTHER)}
    assert len(owners) == 2
    assert not any(owner is None or KEY[:8] in owner for owner in owners)
    assert load_keys(None, {}).owner(None) == "", "without keys everybody is nobody"


def test_without_keys_only_this_machine_is_let_in() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="lets other machines in, and no API keys are set"):
            bind(host, 0, Keys())
    bind("0.0.0.0", 0, Keys([KEY])).close()
    with bind("localhost", 0, Keys()) as sock:
        sock.listen()
        host, port = sock.getsockname()[:2]
        with pytest.raises(ConfigError, match="cannot serve at"):
            bind(host, port, Keys())
    with pytest.raises(ConfigError, match="is no address of this machine"):
        bind("no.such.host.invalid", 0, Keys())
    result = CliRunner().invoke(cli, ["runner-serve", "--runner", "mock", "--host", "0.0.0.0", "--port", "0"])
    assert result.exit_code == 2
    assert "--api-key-file" in result.output


# --------------------------------------------------------------------------------------------- what is taken


def test_bad_calls_are_refused_in_one_sentence_and_harm_nobody() -> None:
    limits = Limits(max_body_bytes=4000, max_sequences=3, max_text_chars=50, max_ids=5)
    with serving(limits=limits) as served:
        began = served.post("/v1/inference", named("c", 1, [5, 6]))[1]["token_ids"]
        for path, body, status in (
            ("/v1/inference", b"", 400),
            ("/v1/inference", b"[1]", 400),
            ("/v1/inference", b"[" * 3000, 400),
            ("/v1/inference", b'{"sequences":NaN}', 400),
            ("/v1/inference", b"\xff\xfe", 400),
            ("/v1/inference", b"x" * 4001, 413),
            ("/v1/inference", json.dumps(plain(*[[5]] * 4)).encode(), 400),
            ("/v1/inference", json.dumps(plain([])).encode(), 400),
            ("/v1/inference", json.dumps(plain([125])).encode(), 400),
            ("/v1/inference", json.dumps(plain([5], temperature=-1)).encode(), 400),
            ("/v1/inference", json.dumps({**plain([5]), "block_tables": [[0]]}).encode(), 400),
            ("/inference", b'{"token_ids":[5]}', 400),
            ("/inference", b'{"token_ids":[[5,-1]]}', 400),
            ("/v1/tokenize", b'{"text":7}', 400),
            ("/v1/tokenize", b'{"text":"' + b"a" * 51 + b'"}', 400),
            ("/v1/tokenize", b'{"messages":[]}', 400),
            ("/v1/tokenize", b'{"messages":[{"role":1}]}', 400),
            ("/v1/detokenize", b'{"token_ids":[125]}', 400),
            ("/v1/detokenize", b'{"token_ids":[1,1,1,1,1,1]}', 400),
            ("/v1/detokenize", b'{"token_ids":[true]}', 400),
        ):
            got, answer = served.call("POST", path, body)
            assert got == status, (path, body[:60], answer)
            assert json.loads(answer)["error"]["message"]
        assert served.call("POST", "/v1/inference", b"{}", Content_Type="text/plain")[0] == 415
        assert served.call("GET", "/v1/inference")[0] == 405
        assert served.call("GET", "/v1/nothing")[0] == 404
        # At the limits, everything is taken.
        assert served.post("/v1/inference", plain([5], [6], [7]))[0] == 200
        assert served.post("/v1/tokenize", {"text": "a" * 50})[0] == 200
        assert served.post("/v1/detokenize", {"token_ids": [5] * 5})[0] == 200
        going_on = named("c", 1, began, at=3)
        params = SamplingParams(temperature=0, max_tokens=2)
        assert [*began, *served.post("/v1/inference", going_on)[1]["token_ids"]] == alone([5, 6], params)


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ({"params": {"top_q": 1}}, "top_q"),
        ({"params": {"top_k": -7}}, "top_k"),
        ({"params": {"min_tokens": 9, "max_tokens": 3}}, "min_tokens"),
        ({"temperature": 1000}, "temperature"),
        ({"params": {"stop_token_ids": [125]}}, "125"),
        ({"params": {"logit_bias": {"125": 1}}}, "125"),
        ({"params": {"logit_bias": {"9" * 5000: 1}}}, "logit_bias"),
        ({"cache_salt": 5}, "cache_salt must be a text"),
        ({"cache_salt": ""}, "cache_salt must be a text"),
        ({"cache_salt": "\ud800"}, "cache_salt contains a lone surrogate"),
    ],
)
def test_a_bad_parameter_is_the_error_of_its_own_sequence(start: dict[str, Any], says: str) -> None:
    with serving() as served:
        step = named("c", 1, [5, 6], **start)
        step["sequences"] += named("c", 2, [7, 8])["sequences"]
        status, answer = served.post("/v1/inference", step)
        assert status == 200
        assert says in answer["errors"]["1"]
        assert answer["token_ids"] == [None, *alone([7, 8], GREEDY)]


def test_a_dead_engine_is_not_ready_and_every_sequence_hears_why() -> None:
    with serving(MockRunner(script=Script(dead_step=2))) as served:
        served.post("/v1/inference", named("c", 1, [5, 6]))
        _, answer = served.post("/v1/inference", named("c", 2, [5, 6]))
        assert "the script ends the mock runner" in answer["errors"]["2"]
        assert served.call("GET", "/health")[0] == 503
        assert served.call("GET", "/livez")[0] == 503
        assert served.post("/v1/inference", named("c", 3, [5, 6]))[0] in (200, 503)


def test_the_vocabulary_is_the_tokenizer_s() -> None:
    import base64

    with serving() as served:
        answer = json.loads(served.call("GET", "/v1/vocabulary")[1])
        tokenizer = served.llm.tokenizer
        assert tokenizer is not None
        assert [base64.b64decode(t) for t in answer["token_bytes"]] == [tokenizer.token_bytes(i) for i in range(125)]
        assert (answer["vocab_size"], answer["eos_ids"]) == (125, [2])
        ids = served.post("/v1/tokenize", {"text": "hello world"})[1]["token_ids"]
        assert served.post("/v1/detokenize", {"token_ids": ids})[1] == {"text": "hello world"}
        chat = [{"role": "user", "content": "hello"}]
        assert served.post("/v1/tokenize", {"messages": chat})[1]["token_ids"] == tokenizer.chat(chat)


# ---------------------------------------------------------------------------------------------- what is held


def test_a_sequence_is_kept_while_it_is_asked_for_and_freed_a_minute_later() -> None:
    with serving() as served:
        tokens = [5, 6]
        for at in range(2, 6):
            step = named("c", 1, tokens) if at == 2 else named("c", 1, tokens[-1:], at=at)
            tokens += served.post("/v1/inference", step)[1]["token_ids"]
            served.forget_idle(seconds=59)
            assert served.stepper.num_held == 1
        served.forget_idle(seconds=2)
        assert served.stepper.num_held == 0
        wait_until(lambda: not served.llm.engine.scheduler.resting)
        assert served.post("/v1/inference", named("c", 1, tokens[-1:], at=6))[1]["unknown"] == [1]


def test_the_same_question_gives_the_same_token_and_one_about_another_past_begins_anew() -> None:
    with serving() as served:
        step = named("c", 1, [5, 6], temperature=1.5)
        answer = served.post("/v1/inference", step)[1]
        assert [served.post("/v1/inference", step)[1] for _ in range(3)] == [answer] * 3
        [token] = answer["token_ids"]
        on = named("c", 1, [token], at=3)
        assert served.post("/v1/inference", on)[1] == served.post("/v1/inference", on)[1]
        assert served.post("/v1/inference", step)[1] == answer, "also from further back"
        assert served.post("/v1/inference", named("c", 1, [(token + 1) % 125], at=3))[1]["unknown"] == [1]
        assert served.stepper.num_held == 0


def test_those_unused_for_longest_make_room_for_new_ones() -> None:
    with serving(limits=Limits(max_held=3)) as served:
        first = {}
        for i in range(1, 5):
            served.now += 1
            first[i] = served.post("/v1/inference", named("c", i, [5, i + 5]))[1]["token_ids"]
            assert served.stepper.num_held <= 3
        assert served.post("/v1/inference", named("c", 1, first[1], at=3))[1]["unknown"] == [1]
        assert "unknown" not in served.post("/v1/inference", named("c", 2, first[2], at=3))[1]


def test_the_seeds_words_go_on_where_the_tokens_are_the_same_and_copies_stay_apart() -> None:
    with serving(MockRunner(), max_num_seqs=4) as served:
        contexts = [[5] * 40, [5] * 40, [9, 8]]
        for _ in range(6):
            status, answer = served.post("/v1/inference", plain(*contexts))
            assert status == 200
            contexts = [[*ids, token] for ids, token in zip(contexts, answer["token_ids"], strict=True)]
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        assert [ids[-6:] for ids in contexts] == [alone(p, params) for p in ([5] * 40, [5] * 40, [9, 8])]
        assert served.stepper.num_held == 3
        stats = served.llm.stats()
        assert stats.num_requests == 3
        assert stats.num_prefill_tokens + stats.num_decode_tokens <= 82 + 15 + 3, "nothing was computed twice"
        served.forget_idle()
        assert served.stepper.num_held == 0
        _, answer = served.post("/inference", {"token_ids": contexts, "is_prefill": False, "temperature": 0})
        assert answer["token_ids"] == [alone(ids, GREEDY)[0] for ids in contexts]


def test_a_call_that_is_refused_loses_no_sequence_that_it_was_about() -> None:
    with serving() as served:
        going_on = [5, 6, *served.post("/v1/inference", plain([5, 6]))[1]["token_ids"]]
        too_long = [5] * (served.llm.engine.max_len + 1)
        assert served.post("/v1/inference", plain(going_on, too_long))[0] == 400
        assert served.stepper.num_held == 1
        assert served.post("/v1/inference", plain(going_on))[1]["token_ids"] == alone(going_on, GREEDY)
        assert served.llm.stats().num_requests == 1
        served.forget_idle()
        wait_until(lambda: not served.llm.engine.scheduler.resting)


def test_more_sequences_than_are_held_at_a_time_are_refused_and_not_begun() -> None:
    with serving(limits=Limits(max_held=2)) as served:
        many = {**named("c", 1, [5]), "sequences": [named("c", i, [5])["sequences"][0] for i in range(3)]}
        for body in (plain([5], [6], [7]), many):
            status, answer = served.post("/v1/inference", body)
            assert status == 503
            assert "the 2 sequences that this server holds are all in use" in answer["error"]["message"]
        assert served.stepper.num_held == served.llm.stats().num_requests == 0
        assert served.post("/v1/inference", plain([5], [6]))[0] == 200


def test_large_prompts_are_prepared_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm_server.stepper.NUM_AT_ONCE", 20)
    with serving() as served:
        threads, prepare = [], served.llm.engine.prepare

        def noting(request: Any) -> Any:
            threads.append(threading.current_thread())
            return prepare(request)

        monkeypatch.setattr(served.llm.engine, "prepare", noting)
        for size in (10, 11, 30):
            assert served.post("/v1/inference", plain([5] * size))[1]["token_ids"] == alone([5] * size, GREEDY)
            assert served.post("/v1/inference", named("c", size, [6] * size))[1]["token_ids"]
        assert [thread is threads[0] for thread in threads] == [True] * 4 + [False] * 2


# --------------------------------------------------------------------------------------------- as a process


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with command(REPO, "runner-serve", "--port=0", *options) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        found = re.search(r"http://\S+", running.stdout.readline())
        assert found, running.stderr.read()
        yield running, found[0]


def ask(config: str, url: str | None, tmp_path: Path) -> list[tuple[str, list[int]]]:
    text = (REPO / "examples" / "configs" / config).read_text(encoding="utf-8")
    if url is not None:
        assert "http://127.0.0.1:8000" in text
        text = text.replace("http://127.0.0.1:8000", url)
    file = tmp_path / config
    file.write_text(text, encoding="utf-8")
    with LLM.from_config(file) as llm:
        outputs = llm.generate(
            ["What is the capital of Peru?", "The capital of France"],
            [SamplingParams(temperature=0, max_tokens=12), SamplingParams(temperature=1, seed=4, max_tokens=12)],
        )
    return [(o.text, o.token_ids) for o in outputs]


def test_two_configurations_that_differ_in_the_runner_alone_give_the_same_answers(tmp_path: Path) -> None:
    import yaml

    files = [REPO / "examples" / "configs" / name for name in ("http.yaml", "numpy.yaml")]
    http, numpy = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
    assert {k for k in {*http, *numpy} if http.get(k) != numpy.get(k)} == {"runner"}
    with process("--config", "examples/configs/numpy.yaml") as (running, url):
        assert ask("http.yaml", url, tmp_path) == ask("numpy.yaml", None, tmp_path)
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
        assert running.stderr is not None
        assert running.stderr.read() == ""
