"""`/metrics` of `nanovllm serve`: parsed as Prometheus does, and compared with what was asked for."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from http_support import wait_until
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm_server.options import ServerOptions
from serve_support import Served, serving
from support import REPO

ASK = {"model": "model", "prompt": list(range(1, 40)), "max_tokens": 4, "temperature": 0, "ignore_eos": True}


class Numbers:
    """One scrape."""

    def __init__(self, served: Served) -> None:
        status, body = served.call("GET", "/metrics")
        assert status == 200
        self.families = {family.name: family for family in text_string_to_metric_families(body.decode())}

    def __call__(self, name: str, **labels: str) -> float:
        family = self.families[f"nanovllm_{name.removesuffix('_total').removesuffix('_count').removesuffix('_sum')}"]
        found = [s.value for s in family.samples if s.name == f"nanovllm_{name}" and s.labels == labels]
        assert len(found) == 1, (name, labels, family.samples)
        return found[0]


def ask(served: Served, **changes: Any) -> Any:
    status, answer = served.post("/v1/completions", {**ASK, **changes})
    assert status == 200, answer
    return answer


def test_a_scripted_run_adds_up() -> None:
    with serving(MockRunner(block_size=4)) as served:
        answers = [ask(served), ask(served), ask(served, n=2, prompt=[7] * 5, max_tokens=3)]
        served.post("/v1/completions", {**ASK, "n": 0})
        served.post("/v1/completions", {**ASK, "model": "other"})
        served.call("GET", "/nothing/here")
        wait_until(lambda: Numbers(served)("running") == 0)
        numbers = Numbers(served)
        stats, blocks = served.llm.stats(), served.llm.engine.kv_blocks()
    usage = [answer["usage"] for answer in answers]
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usage)
    assert cached > 0, "the second prompt is the first one again"
    # n = 2 computes one prompt; both of its answers are answers.
    assert numbers("tokens_total", kind="prompt") == sum(u["prompt_tokens"] for u in usage) == 39 + 39 + 5
    assert numbers("tokens_total", kind="cached") == cached
    assert numbers("tokens_total", kind="completion") == sum(u["completion_tokens"] for u in usage) == 4 + 4 + 6
    assert numbers("answers_total", finish="length") == 4
    assert numbers("answers_total", finish="error") == numbers("answers_total", finish="abort") == 0
    for histogram in (
        "time_to_first_token_seconds",
        "queue_seconds",
        "time_per_output_token_seconds",
        "answer_seconds",
    ):
        assert numbers(f"{histogram}_count") == 4
        assert numbers(f"{histogram}_sum") > 0
    assert numbers("queue_seconds_sum") <= numbers("time_to_first_token_seconds_sum") <= numbers("answer_seconds_sum")
    assert numbers("http_calls_total", route="/v1/completions", status="200") == 3
    assert numbers("http_calls_total", route="/v1/completions", status="400") == 1
    assert numbers("http_calls_total", route="/v1/completions", status="404") == 1
    assert numbers("http_calls_total", route="none", status="404") == 1
    assert numbers("errors_total", kind="model_not_found") == 1
    assert numbers("steps_total") == stats.num_steps
    assert numbers("prefill_tokens_total") == stats.num_prefill_tokens
    assert numbers("decode_tokens_total") == stats.num_decode_tokens
    assert numbers("prefix_hit_tokens_total") == stats.num_cached_tokens
    assert numbers("prefix_hit_ratio") == pytest.approx(
        stats.num_cached_tokens / (stats.num_cached_tokens + stats.num_prefill_tokens)
    )
    assert blocks is not None
    assert numbers("kv_blocks") == blocks.total
    assert (numbers("kv_blocks_used"), numbers("kv_usage_ratio"), numbers("ready")) == (0, 0, 1)


def test_what_is_true_now() -> None:
    """Three streams, one of which waits."""
    runner = MockRunner(block_size=4, num_blocks=64, script=Script(delay=0.01))
    with serving(runner, max_num_seqs=2) as served:
        body = {**ASK, "prompt": [1, 2, 3], "max_tokens": 120}
        asking = [threading.Thread(target=served.events, args=("/v1/completions", body)) for _ in range(3)]
        for thread in asking:
            thread.start()
        wait_until(lambda: served.llm.health().num_running == 2 and served.llm.health().num_waiting == 1)
        numbers = Numbers(served)
        assert (numbers("running"), numbers("waiting"), numbers("streams")) == (2, 1, 3)
        assert 0 < numbers("kv_blocks_used") <= numbers("kv_blocks") == 64
        assert numbers("kv_usage_ratio") == numbers("kv_blocks_used") / 64
        for thread in asking:
            thread.join()
        wait_until(lambda: Numbers(served)("streams") == 0)


def test_preemptions_and_recomputed_tokens_are_counted() -> None:
    with serving(MockRunner(block_size=4, num_blocks=14)) as served:
        body = {**ASK, "max_tokens": 24, "prompt": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}
        assert served.post("/v1/completions", body)[0] == 200
        numbers, stats = Numbers(served), served.llm.stats()
    assert numbers("preemptions_total") == stats.num_preemptions > 0


def test_failures_are_counted_by_kind_also_in_the_middle_of_a_stream() -> None:
    with serving(MockRunner(script=Script(fail_steps=(3,), delay=0.02))) as served:
        # What came before the failure is an event of its own, unless the reader was slow.
        status, raw = served.call("POST", "/v1/completions", json.dumps({**ASK, "stream": True}).encode())
        assert b'"code": "generation_failed"' in raw.splitlines()[-2 if status == 200 else -1]
        numbers = Numbers(served)
    assert numbers("errors_total", kind="generation_failed") == 1
    assert numbers("answers_total", finish="error") == 1
    assert numbers("failed_steps_total") == 1
    assert numbers("http_calls_total", route="/v1/completions", status=str(status)) == 1
    assert numbers("answer_seconds_count") == 0  # only of those that came to their end


def test_paths_and_statuses_of_strangers_make_no_series() -> None:
    with serving(options=ServerOptions()) as served:
        for i in range(30):
            served.call("GET", f"/v1/models/name-{i}")
            served.call("GET", f"/path/{i}")
            served.call("POST", f"/v1/{i}", b"{}")
        family = Numbers(served).families["nanovllm_http_calls"]
    routes = {sample.labels["route"] for sample in family.samples}
    assert routes == {"/v1/models/{name}", "none"}


def test_two_servers_in_one_process_count_apart() -> None:
    with serving() as one, serving() as other:
        ask(one)
        assert Numbers(one)("answers_total", finish="length") == 1
        assert Numbers(other)("answers_total", finish="length") == 0


def test_every_metric_is_in_the_reference() -> None:
    page = (REPO / "docs" / "server" / "metrics.md").read_text("utf-8")
    with serving() as served:
        ask(served)
        names = set(Numbers(served).families)
    documented = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `nanovllm_")}
    assert {name.removesuffix("_total") for name in documented} == names
