"""Comparisons: turns, ratios, and children that die, hang, lie or talk too much. No figure here is a timing."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nanovllm.bench import show, tables
from nanovllm.bench.child import Child, ChildFailed, Contestant
from nanovllm.bench.compare import Comparison, compare
from nanovllm.bench.worker import own_engine
from nanovllm.bench.workload import Job, Workload
from nanovllm.builtin.mock import expected
from nanovllm.cli import cli
from nanovllm.config import load

WORKLOAD = Workload(name="two", jobs=(Job((5, 6), 2), Job((7,), 3)), prefill=(1,) * 40, decode=(2, 3))

# A child without nanovllm: `answer(message, number)` is what its program defines.
CHILD = """
import json, os, sys, time
def run(jobs, seconds=1.0, token=9):
    return {"seconds": seconds, "tokens": [[token] * n for _, n in jobs], "peak_memory": 4_000_000}
BODY
print(json.dumps({"ready": {"vocab_size": 10, "max_len": 100}}), flush=True)
sys.stdin.readline()
for number, line in enumerate(sys.stdin):
    print(json.dumps(answer(json.loads(line)["jobs"], number)), flush=True)
"""


def child(name: str, body: str) -> Contestant:
    program = CHILD.replace("BODY", textwrap.dedent(body))
    return Contestant(name=name, command=(sys.executable, "-c", program))


def steady(name: str, seconds: float = 1.0, token: int = 9) -> Contestant:
    """One token takes `seconds`."""
    return child(
        name,
        f"def answer(jobs, number):\n    return run(jobs, {seconds} * max(n for _, n in jobs), {token})",
    )


def compared(*contestants: Contestant, runs: int = 2, timeout: float = 60, probe: float = 40.0) -> Comparison:
    return compare(
        contestants,
        lambda vocab_size, max_len: WORKLOAD,
        runs=runs,
        timeout=timeout,
        probe=lambda: probe,
        settle_seconds=0,
    )


def test_ratios_are_of_readings_taken_side_by_side() -> None:
    comparison = compared(steady("slow", 2.0), steady("quick", 0.5))
    assert [r.name for r in comparison.results] == ["slow", "quick"]
    slow, quick = (r.rates for r in comparison.results)
    assert (slow["prefill"].num_tokens, slow["prefill"].seconds) == (40, (2.0, 2.0))
    assert slow["decode"].tokens_per_second == pytest.approx(1 / 2)  # 64 tokens between 1 and 65
    assert quick["decode"].tokens_per_second == pytest.approx(2)
    assert quick["throughput"].tokens_per_second == pytest.approx(5 / 1.5)
    assert {r.metric: r.values for r in comparison.ratios} == {
        metric: pytest.approx((0.25, 0.25)) for metric in ("prefill", "decode", "throughput")
    }
    assert comparison.bandwidth == ((40.0, 40.0),) * 6
    assert comparison.agreements[0].num_equal == comparison.agreements[0].num_requests == 2
    assert comparison.failures == {}


def test_the_spread_of_a_ratio_is_that_of_its_rounds() -> None:
    drifting = child(
        "drifting",
        """
        def answer(jobs, number):
            # prefill 1, decode 2 calls: twice to warm up; then a round is 4 calls
            return run(jobs, (1.0, 2.0, 4.0)[max(0, number - 3) // 4] * max(n for _, n in jobs))
        """,
    )
    ratios = {r.metric: r for r in compared(drifting, steady("steady"), runs=3).ratios}
    assert ratios["throughput"].values == pytest.approx((1.0, 0.5, 0.25))
    assert ratios["throughput"].median == pytest.approx(0.5)


def test_tokens_that_differ_are_said() -> None:
    comparison = compared(steady("a", token=8), steady("b", token=9))
    assert comparison.agreements[0].num_equal == 0
    assert "a and b gave equal tokens in 0 of 2 requests." in tables.terminal("", show.comparison_tables(comparison))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('no such weights')", "bad died with status 1: no such weights"),
        ("def answer(jobs, number):\n    os._exit(7)", "bad died with status 7: it said nothing"),
        ("def answer(jobs, number):\n    time.sleep(60)", "bad gave no answer for 2 s; if it is only slow, "),
        ("def answer(jobs, number):\n    return {'error': 'out of memory'}", "bad: out of memory"),
        ("def answer(jobs, number):\n    return [1, 2]", "bad answered '[1, 2]\\n', which is no answer"),
        ("def answer(jobs, number):\n    return {'seconds': 1}", "which is no answer"),
        ("print('hello')", "bad answered 'hello\\n', which is no answer"),
        (
            "def answer(jobs, number):\n    return run(jobs[:1]) | {'tokens': [[1]]}",
            "bad: request 0 gave 1 tokens instead of 65",
        ),
    ],
    ids=["dies at start", "dies later", "hangs", "says so", "no object", "a key is missing", "chatter", "too short"],
)
def test_one_that_fails_is_named_and_the_others_are_measured(body: str, message: str) -> None:
    comparison = compared(steady("good"), child("bad", body), steady("fine"), timeout=2)
    assert message in comparison.failures["bad"]
    assert "\n" not in comparison.failures["bad"]
    assert [r.name for r in comparison.results] == ["good", "fine"]
    assert {(r.first, r.second) for r in comparison.ratios} == {("good", "fine")}


def test_one_that_dies_in_the_middle_leaves_whole_rounds_to_the_others() -> None:
    late = child("late", "def answer(jobs, number):\n    return run(jobs) if number < 5 else sys.exit('gone')")
    comparison = compared(steady("a"), late, steady("b"), runs=3)
    assert comparison.failures == {"late": "late died with status 1: gone"}
    assert all(len(r.values) == 3 for r in comparison.ratios)


def test_when_all_fail_there_is_nothing_but_reasons() -> None:
    comparison = compared(child("a", "sys.exit(1)"), Contestant(name="b", command=("no-such-program-here",)))
    assert comparison.results == comparison.ratios == ()
    assert comparison.failures["b"] == "b cannot be started: No such file or directory"
    json.dumps(comparison.to_json())


def test_a_workload_that_one_cannot_hold_is_its_failure_alone() -> None:
    small = Contestant(name="small", command=(*steady("").command[:2], steady("").command[2].replace("100", "50")))
    comparison = compared(small, steady("large"))
    assert comparison.failures == {
        "small": "small: the decode prompt of workload two: 2 prompt tokens and 65 new ones are more than the 50 that "
        "one sequence can hold; choose shorter lengths, or raise scheduler.max_model_len or cache.memory"
    }
    assert [r.name for r in comparison.results] == ["large"]


def test_closing_ends_a_child_that_is_busy() -> None:
    busy = Child(child("busy", "def answer(jobs, number):\n    time.sleep(60)"), timeout=0.2)
    with pytest.raises(ChildFailed, match="no answer"):
        busy.generate([Job((1,), 1)])
    busy.close()
    busy.close()
    assert busy._process.returncode is not None


def test_what_lies_in_the_working_directory_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("numpy.py").write_text("raise SystemExit('a stranger')")
    compared_here = compared(*(own_engine(name, load(overrides={"runner": "mock"}).config) for name in "ab"))
    assert compared_here.failures == {}


def test_what_libraries_print_does_not_reach_the_protocol() -> None:
    program = """
import os, sys
from nanovllm.bench.worker import serve
class Loud:
    facts = {"vocab_size": None, "max_len": 9}
    def generate(self, jobs):
        print("python talks")
        os.write(1, b"and so does C")
        if jobs[0].num_tokens == 3:
            raise ValueError("three is\\ntoo much")
        return [[1] * job.num_tokens for job in jobs]
serve(lambda settings: Loud())
"""
    loud = Child(Contestant(name="loud", command=(sys.executable, "-c", program)), timeout=60)
    try:
        assert loud.facts == {"vocab_size": None, "max_len": 9}
        with pytest.raises(ChildFailed, match=r"^loud: ValueError: three is$"):
            loud.generate([Job((1,), 3)])
        assert loud.generate([Job((1,), 2)]).tokens == [[1, 1]]  # and it goes on
    finally:
        loud.close()


# ---------------------------------------------------------------------------------- the command line


def run(*arguments: str | Path) -> Result:
    runner = CliRunner(env={"MODEL_PATH": None, "TOKENIZER_PATH": None})
    return runner.invoke(cli, ["bench", *map(str, arguments)], prog_name="nanovllm")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"requests": [{"prompt": [5, 6, 7], "out": 4}] * 2, "p32": [1, 2]}), encoding="utf-8")
    return path


@pytest.fixture
def configs(tmp_path: Path) -> tuple[Path, Path]:
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"runner: {{type: mock, seed: {seed}}}\n", encoding="utf-8")
    return tmp_path / "a.yaml", tmp_path / "b.yaml"


def test_one_configuration_to_every_kind_of_output(small: Path, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "md", "svg")}
    result = run(
        "-r", "mock", "--workload", small, "--runs", "1",
        "--json", files["json"], "--markdown", files["md"], "--plot", files["svg"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "demo on mock" in result.stdout
    assert "small.json: 2 requests, 6 prompt and 8 output tokens; 1 run" in result.stdout
    document = json.loads(files["json"].read_text(encoding="utf-8"))
    assert document["prefill"] is None  # the file has no p512
    assert document["throughput"]["num_tokens"] == 8
    assert document["subject"]["runner"] == "mock"
    assert "### Latency, ms" in files["md"].read_text(encoding="utf-8")
    assert files["svg"].read_text(encoding="utf-8").startswith("<svg")


def test_requests_are_drawn_as_asked(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    lengths = ("--num-requests", "3", "--input-len", "7", "--output-len", "2-5", "--seed", "4")
    result = run("-r", "mock", *lengths, "--runs", "1", "--json", out, "--format", "comparison-md")
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    assert (document["workload"]["requests"], document["workload"]["prompt_tokens"]) == (3, 21)
    assert 6 <= document["workload"]["output_tokens"] <= 15
    assert result.stdout.startswith("### demo\n\n| Implementation | CPU (tok/s) |")


def test_two_configurations_in_children(small: Path, configs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    a, b = configs
    result = run("--compare", a, b, a, "--workload", small, "--runs", "1", "--json", out)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [r["name"] for r in document["results"]] == [f"{a} (1)", str(b), f"{a} (3)"]
    assert [(x["num_equal"], x["num_requests"]) for x in document["agreements"]] == [(0, 2), (2, 2), (0, 2)]
    assert expected([5, 6, 7], 4, seed=1) != expected([5, 6, 7], 4, seed=2)
    assert {r["metric"] for r in document["ratios"]} == {"decode", "throughput"}
    for ratio in document["ratios"]:
        assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert f"{a} (1) / {b}" in result.stdout


def test_flags_reach_every_configuration(small: Path, configs: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = run("--compare", *configs, "--set", "runner.seed=7", "--workload", small, "--runs", "1", "--json", out)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text(encoding="utf-8"))["agreements"][0]["num_equal"] == 2


def test_a_configuration_that_cannot_run_is_one_sentence_and_status_5(
    small: Path, configs: tuple[Path, Path], tmp_path: Path
) -> None:
    dead = tmp_path / "dead.yaml"
    dead.write_text("runner: {type: mock, script: {dead_step: 3}}\n", encoding="utf-8")
    result = run("--compare", configs[0], dead, "--workload", small, "--runs", "1")
    assert result.exit_code == 5
    assert f"error: {dead}: request 0 failed: the runner failed: the script ends" in result.stderr
    assert "Not measured" in result.stdout
    assert str(configs[0]) in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "a.yaml"], "--compare takes two configurations or more, not 1"),
        (["--compare"], "not 0"),
        (["a.yaml"], "bench takes one configuration by --config, and a.yaml was given without it"),
        (["--compare", "a.yaml", "none.yaml"], "configuration file none.yaml cannot be read"),
        (["--compare", "a.yaml", "b.yaml", "-c", "a.yaml"], "--compare and --config both name configurations"),
        (["--compare", "a.yaml", "b.yaml", "--plot", "x.svg"], "--plot shows one engine"),
        (["--plot", "x.png"], "--plot writes SVG, not 'x.png'"),
        (["--runs", "0"], "0 is not in the range"),
        (["--num-requests", "0"], "0 is not in the range"),
        (["--timeout", "0"], "0.0 is not in the range"),
        (["--input-len", "9-3"], "'9-3' must go upwards"),
        (["--input-len", "0"], "'0' must go upwards, from 1"),
        (["--output-len", "x"], "'x' is neither a number nor a range"),
        (["--output-len", "-5"], "'-5' is neither"),
        (["--preset", "nano-vllm", "--seed", "1", "--input-len", "4"], "--preset and --input-len, --seed both say"),
        (["--preset", "other"], "'other' is not"),
        (["--workload", "none.json"], "workload none.json cannot be read"),
        (["--preset", "nano-vllm", "-r", "mock"], "holds the token id 9996, but the model's vocabulary has 125"),
        (["--input-len", "5000", "-r", "mock"], "more than the 4096 that one sequence can hold"),
        (
            ["-r", "mock", "--runs", "1", "--json", "no/such/directory.json"],
            "cannot be written: there is no directory no/such",
        ),
    ],
)
def test_bad_usage_is_status_2_and_one_sentence(
    arguments: list[str], message: str, configs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(configs[0].parent)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
